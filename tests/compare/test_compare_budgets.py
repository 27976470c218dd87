"""Budgets: equal steps, equal trainable parameters, equal wall-clock."""

from __future__ import annotations

from pathlib import Path

import pytest
from comparing import compare
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_compare_plan import CONTEXT

import weft
from weft.compare.plan.budgets import (
    Equal,
    check_budget,
    lowest_rank,
    nearest_rank,
    with_ranks,
    with_steps,
)
from weft.compare.plan.entries import parse_methods
from weft.compare.plan.sweep import Sweep, count_runs, missing, tune
from weft.compare.report.comparison import row_of
from weft.compare.request import Budget, parse_budget
from weft.compare.run.trial_runner import RunnerConfig, open_runner
from weft.methods import to_json

SPLITS = "batch=12,train=60,validation=30,test=60"


def test_budgets_as_they_are_written() -> None:
    assert parse_budget("steps") == parse_budget("steps=150") == Budget()
    assert parse_budget("parameters").equal == Equal("parameters")
    assert parse_budget("parameters=5000,steps=9") == Budget(
        equal=Equal("parameters", 5000), steps=9
    )
    assert parse_budget("seconds=2.5,batch=4") == Budget(equal=Equal("seconds", 2.5), batch=4)
    assert [
        str(parse_budget(text).equal)
        for text in ("steps=9", "parameters", "parameters=50000000", "seconds=2.5")
    ] == ["steps", "parameters", "parameters=50000000", "seconds=2.5"]


@settings(deadline=None, max_examples=200)
@example(10, 9, 0, 1, 40)  # 9 is nearer than 18
@given(
    st.integers(0, 400),
    st.integers(1, 9),
    st.integers(0, 50),
    st.integers(1, 5),
    st.integers(0, 40),
)
def test_no_rank_within_bounds_comes_nearer(
    target: int, each: int, fixed: int, low: int, more: int
) -> None:
    def count(rank: int) -> int:
        return fixed + each * rank

    best = nearest_rank(count, target, low, low + more)
    assert low <= best <= low + more
    assert abs(count(best) - target) == min(
        abs(count(rank) - target) for rank in range(low, low + more + 1)
    )


def test_bounds_that_a_method_sets_on_its_rank_are_kept() -> None:
    configs = [entry.config for entry in parse_methods("lora,adalora:target_r=4,dylora:r_min=3")]
    assert [lowest_rank(config) for config in configs] == [1, 4, 3]


@pytest.mark.parametrize(
    ("equal", "methods"),
    [(Equal("parameters", 500), "lora:r=4,vera"), (Equal("parameters"), "vera,lora:r=4")],
)
def test_a_rank_that_was_asked_for_is_refused_where_the_budget_chooses_it(
    equal: Equal, methods: str
) -> None:
    with pytest.raises(weft.ConfigError, match="'LoRA r=4': leave r=4 out"):
        check_budget(equal, parse_methods(methods))
    check_budget(Equal("parameters"), parse_methods("lora:r=4,vera"))
    check_budget(Equal("seconds", 3.0), parse_methods(methods))


def test_two_rows_that_would_be_alike_are_refused() -> None:
    rows = {"LoRA r=4": {"r": 4, "trainable": 90}, "LoRA": {"r": 4, "trainable": 90}}
    with pytest.raises(weft.ConfigError, match="'LoRA r=4'"):
        with_ranks(parse_methods("lora:r=4,lora"), rows, 90)


@pytest.fixture(scope="module")
def runner():
    return open_runner(
        RunnerConfig(
            task="digits",
            model="digits-vit",
            limits={"train": 20, "validation": 20, "test": 20},
            device="cpu",
        )
    )


def with_head(text: str) -> dict[str, dict[str, object]]:
    return {
        entry.label: to_json(entry.with_head(("classifier",), 0)) for entry in parse_methods(text)
    }


def test_ranks_are_nearest_on_the_model_itself(runner) -> None:
    named = ("VeRA", "DoRA", "LoRAFA", "AdaLoRA", "DyLoRA", "Bottleneck")
    found = runner.ranks(
        with_head("lora:r=2,vera,dora,lorafa,adalora,dylora,bottleneck,bitfit"), None, 48
    )
    assert (
        found["target"]
        == found["rows"]["LoRA r=2"]["trainable"]
        == 2 * 4 * (4 * (48 + 48) + 2 * (48 + 112))
    )
    for name, config in with_head(",".join(named)).items():
        row = found["rows"][name]
        assert row["trainable"] == runner._count({**config, "r": row["r"]})
        distance = abs(row["trainable"] - found["target"])
        for beside in {max(1, row["r"] - 1), min(48, row["r"] + 1)}:
            assert distance <= abs(runner._count({**config, "r": beside}) - found["target"]), name
    assert found["rows"]["BitFit"]["r"] is None
    entries, notes = with_ranks(
        parse_methods("lora:r=2,vera,bitfit"), found["rows"], found["target"]
    )
    assert [entry.label for entry in entries] == [
        "LoRA r=2",
        f"VeRA r={entries[1].config.r}",
        "BitFit",
    ]
    assert any("Methods without a rank" in note and "BitFit" in note for note in notes)
    assert any(
        "No rank is within" in note and "VeRA" in note for note in notes
    )  # 48 are all that make sense here


def test_a_first_method_that_trains_nothing_sets_no_budget() -> None:
    with pytest.raises(weft.ConfigError, match="Head trains nothing but the head"):
        check_budget(Equal("parameters"), parse_methods("head,lora"))
    check_budget(Equal("parameters", 99), parse_methods("head,lora"))


def test_what_cannot_be_attached_is_refused_alone(runner) -> None:
    rows = runner.ranks(with_head("lora:targets=nowhere,dora"), 3000, 48)["rows"]
    assert "nowhere" in rows["LoRA targets=nowhere"]["reason"]
    assert rows["DoRA"]["r"] >= 1


def sweep(entries) -> Sweep:
    return Sweep(entries, ("classifier",), 3, 10, 4, 1e-2, CONTEXT)


def test_time_becomes_steps_and_too_little_time_a_failed_row() -> None:
    costs = {
        "LoRA": {"step_seconds": 0.25},
        "VeRA": {"step_seconds": 2.0},
        "DoRA": {"status": "failed", "reason": "no"},
        "BitFit": {"step_seconds": 0.1},
    }
    entries = with_steps(parse_methods("lora,vera,dora,bitfit"), 5.0, costs)
    assert [entry.steps for entry in entries] == [20, None, None, 50]
    assert "5 s are not enough for the 3 steps that a run needs, at 2 s per step" in (
        entries[1].refused or ""
    )
    assert "could not be measured: no" in (entries[2].refused or "")
    plan = sweep(entries)
    assert {(spec.label, spec.steps) for spec in missing(plan, {})} == {
        ("LoRA", 20),
        ("BitFit", 50),
    }
    assert count_runs(plan, {})[1] == 2 * (3 * 2 + 3)
    assert tune(plan, entries[1], {}).failed == entries[1].refused
    row = row_of(plan, entries[1], {}, None, "")
    assert (row.status, row.reason, row.steps, row.scores) == (
        "failed",
        entries[1].refused,
        None,
        [None] * 3,
    )


def test_a_comparison_at_equal_parameters(tmp_path: Path) -> None:
    done = compare(
        tmp_path / "out",
        "--methods",
        "lora:r=1,dora",
        "--lr",
        "lora=1e-2",
        "--lr",
        "dora=1e-2",
        "--seeds",
        "1",
        "--budget",
        f"parameters,steps=5,{SPLITS}",
        "--workers",
        "1",
    )
    assert done.status == 0, done.errors
    lora, dora = done.json["rows"]
    assert done.json["settings"]["budget"] == "parameters"
    assert done.json["settings"]["parameters"] == lora["trainable"]
    assert dora["method"] == f"DoRA r={dora['config']['r']}"
    said = " ".join(done.printed.split())
    assert f"equal trainable parameters, about {lora['trainable']:,}, and 5 steps of 12" in said
    assert f"Ranks were chosen for {lora['trainable']:,} trainable parameters." in said
    other = compare(tmp_path / "out", "--resume", "--budget", f"steps=5,{SPLITS}")
    assert (other.status, other.errors.count("\n")) == (2, 1)
    assert "--budget 'parameters', and this one has 'steps'" in other.errors


def test_a_comparison_at_equal_seconds_resumes_with_the_same_steps(tmp_path: Path) -> None:
    words = (
        "--methods",
        "bitfit",
        "--lr",
        "bitfit=1e-2",
        "--seeds",
        "1",
        "--workers",
        "1",
        "--budget",
        f"seconds=0.2,{SPLITS}",
    )
    done = compare(tmp_path / "out", *words)
    assert done.status == 0, done.errors
    assert done.json["settings"]["budget"] == "seconds"
    assert done.json["settings"]["steps"] is None
    assert any(note.startswith("The number of steps is what fits") for note in done.json["notes"])
    for row in done.json["rows"]:
        assert row["steps"] == int(0.2 / row["step_seconds"])
        assert f" {row['steps']:,}" in done.printed
    assert done.errors.splitlines()[-1].strip().startswith("4/4 ")
    again = compare(tmp_path / "out", *words, "--resume")
    assert again.status == 0, again.errors
    assert (again.runs, again.json) == (done.runs, done.json)
    losses = {run["spec"]["label"]: len(run["losses"]) for run in done.runs.values()}
    assert losses == {row["method"]: row["steps"] for row in done.json["rows"]}
