"""Single rows: what is counted, what is called reproduced, explained and different."""

import dataclasses
import json

import pytest

import weft
from weft.papers import find_table, rebuild, tables
from weft.papers.architectures import ARCHITECTURES
from weft.papers.figures import figure
from weft.papers.rebuild import Model, configurations


def table(name, **changes):
    """A table with some rows changed: id -> changed fields. Rows that are not named are left out
    where any is.
    """
    found = find_table(name, tables())
    rows = [
        dataclasses.replace(row, **changes.get(f"r{row.id}", {}))
        for row in found.rows
        if not changes or f"r{row.id}" in changes
    ]
    return dataclasses.replace(found, rows=tuple(rows))


def one(name, row_id, **change):
    [result] = rebuild([table(name, **{f"r{row_id}": change})])
    return result


def test_the_table_file_has_126_rows_in_11_tables_and_every_reason_speaks_of_a_count():
    found = tables()
    rows = [row for t in found for row in t.rows]
    assert (len(found), len(rows), len({row.id for row in rows})) == (11, 126, 126)
    for row in rows:
        assert row.model in ARCHITECTURES or row.printed == "-"
        assert bool(row.reason) == (row.ours is not None or row.printed == "-"), row.id
        assert "\n" not in row.reason + row.note
        assert len(row.reason) <= 110, row.id


def test_a_row_that_prints_its_count_is_reproduced_and_says_how():
    assert one("vera-1", "021").status == "reproduced"
    assert one("vera-1", "021").reason.startswith("truncated")
    assert one("vera-1", "028").reason.startswith("rounded")
    assert one("vera-1", "025").reason == "either way"


def test_another_printed_figure_makes_the_row_different():
    wrong = one("vera-1", "021", printed="36.7K")
    assert (wrong.status, wrong.computed, wrong.difference) == ("different", 36_864, 164)
    assert "no reason is known" in wrong.reason


def test_another_configuration_makes_the_row_different():
    wrong = one(
        "vera-1", "021", methods=({"method": "LoRA", "r": 2, "targets": ["query", "value"]},)
    )
    assert (wrong.status, wrong.computed) == ("different", 73_728)


def test_a_reason_explains_the_count_that_it_was_written_for_and_no_other():
    assert one("vera-1", "039").status == "explained"
    wrong = one(
        "vera-1", "039", methods=({"method": "VeRA", "r": 17, "targets": ["query", "value"]},)
    )
    assert (wrong.status, wrong.computed) == ("different", 49_968)
    assert "49,920" in wrong.reason


def test_a_method_that_is_not_there_makes_the_row_different_and_says_so():
    wrong = one("vera-1", "021", methods=({"method": "Nothing", "r": 1},))
    assert (wrong.status, wrong.computed, wrong.why) == (
        "different",
        None,
        "method not available: weft.Nothing",
    )


def test_a_configuration_that_does_not_fit_makes_the_row_different_and_leaves_the_others_alone():
    targets = {"targets": ["nowhere"]}
    first = {"methods": ({"method": "LoRA", "r": 1, **targets},)}
    second = {"methods": ({"method": "BitFit"}, {"method": "LoRA", "r": 1, **targets})}
    results = rebuild([table("vera-1", r021=first, r023=second, r025={})])
    assert [r.status for r in results] == ["different", "different", "reproduced"]
    assert "nowhere" in results[0].why


def test_a_tensor_that_two_methods_train_is_counted_once():
    row = find_table("dora-2", tables()).rows[1]
    model = Model(ARCHITECTURES["VL-BART image"])
    both = model.count(row)
    alone = [model.count(dataclasses.replace(row, methods=(config,))) for config in row.methods]
    shared = 4 * 768  # the biases of the visual embedding, which both name
    assert both.body == sum(count.body for count in alone) - shared == 8_786_688
    assert both.added == 36 * 2 * 768 * 128
    assert weft.adapters(model.root) == {}


def test_the_head_is_counted_apart():
    head = one("vera-5", "083")
    assert (head.status, head.computed) == ("explained", None)
    assert "76,900" in head.reason
    full = one("vera-5", "084")
    assert full.computed == 85_798_656
    assert one("vera-5", "084", head=True).computed == 85_798_656 + 76_900


def test_gpt3_rows_of_the_vera_table_are_its_vectors_and_the_shared_pair():
    """What the reason of the explained rows claims, computed from the attached matrices."""
    model = Model(ARCHITECTURES["GPT-3 175B"])
    rows = [
        row
        for row in find_table("vera-1", tables()).rows
        if row.model == "GPT-3 175B" and "VeRA" in row.row
    ]
    assert len(rows) == 6
    for row in rows:
        [config] = configurations(row)
        adapter = weft.attach(model.root, config)
        shared = next(iter(adapter.sites.values())).shared
        assert shared.A.is_meta and shared.B.is_meta
        assert len({id(site.shared) for site in adapter.sites.values()}) == 1
        stored = adapter.num_parameters + shared.A.numel() + shared.B.numel()
        assert (
            figure(row.printed, row.unit).reading(stored * (4 if row.unit == "bytes" else 1))
            is not None
        ), row.id
        weft.detach(model.root)


@pytest.mark.shared
def test_trained_numbers_and_differences_are_those_of_the_facts(shared):
    facts = {
        row["id"]: row
        for row in json.loads((shared / "facts" / "param_counts.json").read_text(encoding="utf-8"))
    }
    results = rebuild([table("vera-2"), table("dora-2"), table("dora-4"), table("dora-5")])
    assert len(results) >= 20
    for result in results:
        fact = facts[result.row.id]
        assert result.difference == fact["difference_computed_minus_printed"], result.row.id
        assert fact["computed_trainable_params"] in (None, result.trained), result.row.id
