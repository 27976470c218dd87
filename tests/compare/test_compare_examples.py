"""The gap between two rows on the test examples: paired, with its interval; and that it is kept and
told.
"""

from __future__ import annotations

import random
from dataclasses import replace
from statistics import mean

import numpy as np
import pytest
from comparing import Finished
from test_compare_report import found_with, lost

from weft.compare.report import document, table
from weft.compare.report.examples import gap


def answers(share: float, n: int, seed: int) -> str:
    draw = random.Random(seed)
    return "".join("01"[draw.random() < share] for _ in range(n))


def test_the_gap_is_the_difference_of_the_scores_and_its_interval_that_of_a_large_sample() -> None:
    best, other = (
        [answers(share, 2000, 10 * place + k) for k in range(3)]
        for place, share in enumerate((0.8, 0.7))
    )
    found = gap(best, other)
    assert found is not None and found.examples == 2000
    assert found.mean == pytest.approx(
        mean(a.count("1") / 2000 for a in best) - mean(b.count("1") / 2000 for b in other)
    )
    behind = np.array(
        [
            [int(a) - int(b) for a, b in zip(*pair, strict=True)]
            for pair in zip(best, other, strict=True)
        ]
    )
    half = 1.96 * behind.mean(axis=0).std() / 2000**0.5
    assert found.interval == pytest.approx((found.mean - half, found.mean + half), abs=0.05 * half)
    assert gap(best, other) == found  # the same draws every time


def test_examples_are_paired() -> None:
    """Two rows that differ on ten examples of a thousand are told apart however hard the examples
    are.
    """
    best = answers(0.5, 1000, 1)
    right = [place for place, mark in enumerate(best) if mark == "1"][:10]
    other = "".join("0" if place in right else mark for place, mark in enumerate(best))
    found = gap([best], [other])
    assert found is not None and found.mean == pytest.approx(0.01)
    assert 0 < found.interval[0] < 0.01 < found.interval[1] < 0.02
    shuffled = gap([best], ["".join(random.Random(2).sample(other, 1000))])
    assert shuffled is not None and shuffled.interval[0] < -0.02


def test_rows_that_answer_alike_have_no_gap_and_others_no_answer() -> None:
    same = answers(0.7, 50, 1)
    found = gap([same], [same])
    assert found is not None and (found.mean, found.interval) == (0.0, (0.0, 0.0))
    assert gap([same], [same[:-1]]) is None
    assert gap([same, same], [same]) is None
    assert gap([], []) is None


def test_scored_runs_keep_which_examples_are_right(finished: Finished) -> None:
    for run in finished.runs.values():
        if run["spec"]["purpose"] == "final":
            assert run["right"].count("1") / 150 == pytest.approx(run["test"]["score"])
            assert set(run["right"]) <= {"0", "1"} and len(run["right"]) == 150
        else:
            assert "right" not in run


def test_the_json_says_how_far_a_row_is_behind_the_best(finished: Finished) -> None:
    rows = {row["method"]: row for row in finished.json["rows"]}
    best = rows.pop(finished.json["ranking"]["best"])
    (other,) = rows.values()
    assert best["example_gap"] is None
    assert other["example_gap"]["examples"] == 150
    assert other["example_gap"]["mean"] == pytest.approx(best["score_mean"] - other["score_mean"])
    low, high = other["example_gap"]["interval"]
    assert low < other["example_gap"]["mean"] < high
    if finished.json["recommendation"]["method"] == other["method"]:
        assert (
            f"between {100 * low:.1f} and {100 * high:.1f} points lower"
            in finished.json["recommendation"]["why"]
        )


def test_the_gap_is_told_for_the_recommended_row_and_not_where_runs_of_before_kept_no_examples() -> (
    None
):
    given = {
        "scores": [0.8, 0.9, 0.85],
        "nbytes": 9,
        "trainable": 9,
        "reason": None,
        "runs": [],
        "lr": 1.0,
    }
    best = lost(label="A", right=[answers(0.9, 60, k) for k in range(3)], **given)
    other = lost(
        label="B",
        right=[answers(0.88, 60, 9 + k) for k in range(3)],
        **{**given, "scores": [0.8, 0.86, 0.84], "trainable": 5},
    )
    said = table.table_text(found_with([best, other]))
    assert "paired bootstrap over the examples" in " ".join(said.split())
    before = found_with([best, replace(other, right=other.right[:2])])
    assert before.gaps == {}
    assert "bootstrap" not in table.table_text(before)
    origin = document.Origin(command="c", date="d", machine="m", versions={})
    assert "points behind: distance to the highest mean" in str(
        document.document(found_with([best, other]), origin, [])
    )
