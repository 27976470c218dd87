"""--like: measured rows under the printed ones of their method, which conditions differ, and no
task that is no column.
"""

from __future__ import annotations

import json
import re

import pytest
from comparing import weft_command
from test_compare_report import CHROMIUM, inner_and_scrolled

from weft.compare.report import document, markdown, page, paper_table
from weft.compare.report.comparison import Comparison, Row
from weft.errors import ConfigError
from weft.methods import METHODS
from weft.tasks import FAMILIES, GENERATION

KINDS = {name.partition(":")[0] for name in (*FAMILIES, *GENERATION)}


def row(label: str, scores: list[float], **config: object) -> Row:
    return Row(
        label=label,
        config={"method": label, "targets": "all-linear", **config},
        tried={1e-3: 0.5},
        lr=1e-3,
        scores=scores,
        trainable=1234,
        nbytes=99,
    )


def found(task: str, rows: list[Row], metric: str = "accuracy") -> Comparison:
    return Comparison(
        task=task,
        model="some/where/minilm",
        rows=rows,
        seeds=3,
        settings={
            "budget": "steps",
            "steps": 60,
            "batch": 16,
            "head_lr": 1e-3,
            "warm_up": 0.1,
            "weight_decay": 0.0,
        },
        sizes={"train": 2000, "validation": 300, "test": 872},
        classes=("a", "b"),
        head=["classifier"],
        device="x",
        versions={},
        notes=[],
        metric=metric,
    )


ROWS = [
    row("LoRA", [0.80, 0.82, 0.81], r=8),
    row("VeRA", [0.79, 0.80, 0.81], r=256),
    row("Head", [0.7, 0.7, 0.71]),
]


def test_every_printed_number_is_a_percentage_of_a_method_and_a_task_that_weft_has() -> None:
    assert len(paper_table.paper_tables()) == 7
    for name, table in paper_table.paper_tables().items():
        assert set(table.columns) <= KINDS, name
        assert "arXiv:" in table.source, name
        assert {"training data", "steps", "learning rate", "seeds", "scored on", "±"} <= set(
            table.conditions
        ), name
        for one in table.rows:
            assert one["method"] in METHODS and set(one["scores"]) <= set(table.columns.values()), (
                one
            )
            for cell in one["scores"].values():
                assert (
                    20 < cell[0] < 100
                    and len(cell) in (1, 2)
                    and (len(cell) == 1 or 0 <= cell[1] < 5)
                ), one


def test_the_printed_averages_are_those_of_their_rows() -> None:
    for one in paper_table.paper_tables()["dora-paper-commonsense"].rows:
        single = [cell[0] for name, cell in one["scores"].items() if name != "average"]
        assert len(single) == 8
        assert abs(sum(single) / 8 - one["scores"]["average"][0]) < 0.051, one["row"]


def test_ours_stand_under_the_printed_rows_of_their_method_and_the_others_last() -> None:
    beside = paper_table.side_by_side(
        found("sst2:SST-2", ROWS), paper_table.find_paper_table("vera-paper-glue", "sst2:SST-2")
    )
    names = [cells[0] for cells in beside.cells]
    assert names == [
        "base FT",
        "base LoRA",
        "large LoRA",
        "here: LoRA",
        "base VeRA",
        "large VeRA",
        "here: VeRA",
        "here: Head",
    ]
    assert [names[place] for place in beside.ours] == ["here: LoRA", "here: VeRA", "here: Head"]
    assert beside.cells[1] == ["base LoRA", "95.1 ± 0.2", "0.3M", "RoBERTa base"]
    assert beside.cells[3] == ["here: LoRA", "81.0 ± 2.5", "1,234", "minilm"]
    assert beside.header == ("row", "SST-2: accuracy", "trainable", "model")


def test_every_condition_is_said_for_both_sides() -> None:
    table = paper_table.find_paper_table("vera-paper-glue", "sst2:SST-2")
    told = {
        what: (there, here)
        for what, there, here in paper_table.side_by_side(
            found("sst2:SST-2", ROWS), table
        ).differences
    }
    assert set(told) == {"model", *table.conditions} and told["±"][1].startswith("half of the 95 %")
    assert told["model"] == ("RoBERTa base, RoBERTa large", "minilm")
    assert (
        told["training data"][1] == "2,000 examples"
        and told["steps"][1] == "equal steps, 60 steps of 16"
    )
    assert (
        "not used for any choice" in told["scored on"][1]
        and "all-linear: LoRA r=8, VeRA r=256" in told["adapted layers"][1]
    )
    paper = paper_table.side_by_side(
        found("sst2-paper:SST-2", ROWS),
        paper_table.find_paper_table("vera-paper-glue", "sst2-paper:SST-2"),
    )
    assert "optimistic" in {what: here for what, _, here in paper.differences}["scored on"]


def test_a_failed_row_is_laid_there_too() -> None:
    lost = Row(label="VeRA", config={"method": "VeRA"}, tried={}, scores=[None] * 3, reason="no")
    beside = paper_table.side_by_side(
        found("rte:R", [ROWS[0], lost]), paper_table.find_paper_table("vera-paper-glue", "rte:R")
    )
    assert ["here: VeRA", "failed", "-", "minilm"] in [list(cells) for cells in beside.cells]


def test_terminal_markdown_and_page_say_the_same_and_the_terminal_in_80_columns() -> None:
    comparison = found("mrpc:M", ROWS)
    beside = paper_table.side_by_side(
        comparison, paper_table.find_paper_table("lora-paper-glue", "mrpc:M")
    )
    shown = paper_table.side_by_side_text(beside)
    assert max(map(len, shown.splitlines())) <= 80
    origin = document.Origin(command="weft", date="d", machine="m", versions={})
    sections = document.document(comparison, origin, [], beside)
    for text in (shown, markdown.markdown("t", sections), page.page("t", sections, {})):
        plain = " ".join(re.sub(r"<[^>]+>", " ", text.replace("\\", "")).split())
        for said in (
            "here: LoRA",
            "RoB base (LoRA)",
            "89.7",
            "81.0 ± 2.5",
            "comes from the start from MNLI",
            "arXiv:2106.09685",
        ):
            assert said in plain, said


@pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium is installed, so the page was not opened in a browser"
)
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_the_printed_table_without_scrolling_sideways(tmp_path, width: int) -> None:
    comparison = found("arc-e:M", ROWS)
    beside = paper_table.side_by_side(
        comparison, paper_table.find_paper_table("dora-paper-commonsense", "arc-e:M")
    )
    origin = document.Origin(command="weft", date="d", machine="m", versions={})
    html = page.page("t", document.document(comparison, origin, [], beside), {})
    (tmp_path / "paper_table.html").write_text(html, encoding="utf-8")
    assert inner_and_scrolled(tmp_path / "paper_table.html", tmp_path, width) == (width, width)


@pytest.mark.parametrize(
    ("name", "task", "said"),
    [
        ("lora-paper-e2f", "e2e:D", "lora-paper-e2e"),
        ("lora-paper-e2e", "digits", "e2e:DIR"),
        ("vera-paper-image", "sst2:D", "vera-paper-glue"),
    ],
)
def test_what_is_no_table_or_no_column_is_refused_with_the_nearest(
    name: str, task: str, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        paper_table.find_paper_table(name, task)


def test_the_command_refuses_before_it_computes_and_lists_the_tables(tmp_path) -> None:
    status, _, err = weft_command(
        "compare", "--like", "vera-paper-glue", "--out", str(tmp_path / "o")
    )
    assert status == 2 and "'digits'" in err and err.count("\n") == 1
    assert not (tmp_path / "o").exists()
    _, printed, _ = weft_command("compare", "--list")
    assert all(name in printed for name in paper_table.paper_tables())
    assert json.loads(paper_table.PRINTED.read_text(encoding="utf-8"))["schema"] == 1
