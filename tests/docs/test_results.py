"""docs/results is what the records say, and the records say nothing of anybody's machine."""

from __future__ import annotations

import copy
import json
import re
from xml.etree import ElementTree as ET

import pytest
from documents import ROOT

from scripts.results import pages, run
from scripts.results.experiments import EXPERIMENTS, Claim
from scripts.results.findings import NOT_SEEN, SEEN, UNKNOWN, findings, groups, unseen, verdict
from scripts.results.picture import axis, picture
from weft.compare.plan.entries import parse_methods, with_learning_rates
from weft.compare.report.paper_table import find_paper_table
from weft.compare.request import parse_budget

STORED = sorted(run.RECORDS.glob("*.json"))
A, B, C = (f"method {letter}" for letter in "ABC")


def row(name: str, scores: list[float], p: float | None = None, **changes: object) -> dict:
    mean = sum(scores) / len(scores)
    return {
        "method": name,
        "trainable": len(name) * 1000,
        "scores": scores,
        "score_mean": mean,
        "score_interval": [mean - 0.01, mean + 0.02],
        "worse_p": p,
        "example_gap": None,
        "lr": 1e-3,
        "reason": None,
        **changes,
    }


RESULT = {
    "metric": "accuracy",
    "seeds": 3,
    "rows": [
        row(A, [0.9, 0.91, 0.92]),
        row(B, [0.8, 0.82, 0.81], 0.01),
        row(C, [0.9, 0.87, 0.93], 0.4),
    ],
    "ranking": {"best": A},
    "notes": ["x_y"],
    "head_trainable": 5,
    "examples": {"train": 1},
}


def test_the_pages_are_those_of_the_records() -> None:
    made = pages.pages()
    for path, text in made.items():
        assert path.read_text(encoding="utf-8") == text, (
            f"{path.relative_to(ROOT)}: run `make results`"
        )
    there = {path for path in pages.OUT.iterdir() if path.is_file()}
    assert there == set(made), "a page or picture without a record is left over"
    assert made == pages.pages()


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_a_record_is_small_and_whole_and_names_no_machines_folder(path) -> None:
    text = path.read_text(encoding="utf-8")
    record = json.loads(text)
    assert len(text) < 100_000 and record["schema"] == run.SCHEMA and record["name"] == path.stem
    assert not re.search(r"/(home|root|tmp|work|opt|usr|mnt|var)/", text)
    experiment = next(e for e in EXPERIMENTS if e.name == path.stem)
    assert record["command"] == run.command(experiment), (
        "the experiment has changed since: run it again"
    )
    assert (
        {"cpu", "cores"} <= set(record["machine"])
        and record["versions"]["commit"]
        and record["date"]
    )
    assert record["result"]["seeds"] == experiment.seeds >= 3
    assert len(record["result"]["rows"]) == len(experiment.methods)
    assert all(row["status"] == "finished" or row["reason"] for row in record["result"]["rows"])


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda e: e.name)
def test_an_experiment_is_a_command_that_weft_understands(experiment) -> None:
    entries = with_learning_rates(
        parse_methods(",".join(experiment.methods)),
        [f"{m}={r}" for m, r in experiment.rates.items()],
    )
    assert not any(entry.grows for entry in entries), "every method has rates of its own"
    assert all(len(entry.lrs) > 1 for entry in entries), "rates are chosen among several"
    parse_budget(experiment.budget)
    if experiment.like:
        find_paper_table(experiment.like, experiment.task)
    labels = {entry.label for entry in entries}
    assert all({claim.a, claim.b} <= labels for claim in experiment.claims)
    assert experiment.page in pages.TITLES
    words = experiment.command("DATA", "WORK", "OUT")
    assert "{" not in " ".join(words) and words[0] == "compare"


def test_a_claim_is_seen_only_where_the_whole_interval_says_so() -> None:
    assert [verdict(interval, False) for interval in ((0.1, 0.2), (-0.1, 0.2), (-0.2, -0.1))] == [
        SEEN,
        UNKNOWN,
        NOT_SEEN,
    ]
    assert [
        verdict(interval, True) for interval in ((-0.01, 0.2), (-0.03, 0.2), (-0.2, -0.03))
    ] == [SEEN, UNKNOWN, NOT_SEEN]


def test_findings_are_paired_over_the_seeds_and_said_in_words() -> None:
    claims = [
        Claim(A, B, "A is better"),
        Claim(C, A, "C is better"),
        Claim(B, A, "B matches", matches=True),
        Claim(A, "D", "?"),
    ]
    found = findings(RESULT, claims)
    assert [one.verdict for one in found] == [SEEN, UNKNOWN, NOT_SEEN]
    assert found[0].mean == pytest.approx(0.1) and found[0].interval == pytest.approx(
        (0.0752, 0.1248), abs=1e-4
    )
    said = unseen(found)
    assert "A is better" not in said and "is not conclusive" in said and "contradict it" in said
    idle = findings(RESULT, claims, chance=0.9)
    assert {one.verdict for one in idle} == {UNKNOWN} and "no method learns the task" in unseen(
        idle
    )
    lost = copy.deepcopy(RESULT)
    lost["rows"][0]["scores"][1] = None
    assert findings(lost, claims)[0].verdict == UNKNOWN and findings(lost, claims)[0].mean is None


def test_rows_that_the_test_cannot_tell_apart_are_not_ordered() -> None:
    assert groups(RESULT) == (A, [C], [B])
    assert groups({**RESULT, "ranking": None}) is None
    told = pages._ranking_text(RESULT)
    assert (
        f"Significantly worse over the 3 seeds: {B}." in told
        and "says nothing" in told
        and "examples" not in told
    )
    rows = [RESULT["rows"][0], *({**row, "worse_p_examples": 0.0001} for row in RESULT["rows"][1:])]
    assert "Over the test examples, for these runs only: every other row." in pages._ranking_text(
        {**RESULT, "rows": rows}
    )


def test_several_metrics_have_a_table_and_rates_at_an_edge_one_line() -> None:
    several = {
        **RESULT,
        "rows": [
            {**row(A, [0.1]), "metrics": {"BLEU": [0.1, 0.2], "METEOR": [None, 0.3]}},
            row(B, [0.2]),
        ],
    }
    assert "| method A | 0.1500 | – |\n| method B | – | – |" in pages._metrics(several)
    assert pages._metrics(RESULT) == ""
    edge = "{}: the best learning rate, 1e-3, is at the edge of those tried (1e-3, 3e-3); a better one may lie beyond."
    told = pages._notes({"notes": [edge.format(A), "x_y | z", edge.format("DoRA r=4")]})
    assert told == (
        "- x\\_y \\| z\n- Best at an edge of the rates tried, so a better one may be beyond it: "
        "method A 1e-3 (of 1e-3, 3e-3); DoRA r=4 1e-3 (of 1e-3, 3e-3)."
    )


def test_the_picture_is_an_svg_with_every_row_inside_it() -> None:
    rows = [row(f"m{i}", [0.5 + i / 100] * 3) for i in range(16)] + [
        row("lost", [0.1], score_mean=None)
    ]
    root = ET.fromstring(picture({**RESULT, "rows": rows}, "a < b"))
    words = [node.text for node in root.iter() if node.text]
    assert all(f"m{i}" in words for i in range(16)) and "lost" not in words and "a < b" in words
    width, height = (float(v) for v in root.get("viewBox").split()[2:])
    for node in root.iter():
        assert 0 <= float(node.get("cx", node.get("x1", node.get("x", 0)))) <= width
        assert 0 <= float(node.get("cy", node.get("y1", node.get("y", 0)))) <= height
    assert axis(61.2, 88.9)[:2] == (60, 90) and axis(80.1, 80.3)[:2] == (80.0, 80.5)


def test_a_record_keeps_no_path_and_no_time_of_a_step() -> None:
    full = {
        **RESULT,
        "rows": [
            {**row(A, [0.9]), "config": {}, "step_ratio": 1.2, "adapter": "/a/b/out/adapters/A"}
        ],
        "task": "sst2:/a/b/SST-2",
        "model": "/a/b/w/vit",
        "notes": ["sst2:/a/b/SST-2: note"],
    }
    made = run.record(
        EXPERIMENTS[0], full, {"{data}": "/a/b", "{work}": "/a/b/w", "{out}": "/a/b/out"}, {}, 0.5
    )
    assert "/a/b" not in json.dumps(made) and made["result"]["task"] == "sst2:DATA/SST-2"
    assert made["result"]["model"] == "WORK/vit" and "step_ratio" not in made["result"]["rows"][0]
    assert made["chance"] == 0.5 and made["command"].startswith(
        "weft compare --model minilm --task sst2:DATA/SST-2 "
    )
