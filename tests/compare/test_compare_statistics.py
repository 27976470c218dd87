"""Intervals and tests, held to scipy, to numbers worked out by hand, and to properties."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from weft.compare.report.statistics import (
    ALPHA,
    gap_bound,
    holm,
    rank,
    seeds_needed,
    t_interval,
    worse,
)

SCORES = st.floats(0, 1, allow_subnormal=False).map(lambda x: round(x, 3))
TABLES = st.integers(3, 6).flatmap(
    lambda seeds: st.lists(st.lists(SCORES, min_size=seeds, max_size=seeds), min_size=2, max_size=5)
)


@given(st.lists(SCORES, min_size=2, max_size=9).filter(lambda xs: len(set(xs)) > 1))
def test_the_interval_is_student_s(scores: list[float]) -> None:
    low, high = t_interval(scores) or (math.nan, math.nan)
    want = stats.t.interval(
        0.95, len(scores) - 1, loc=sum(scores) / len(scores), scale=stats.sem(scores)
    )
    assert (low, high) == pytest.approx(want, abs=1e-9)


def test_one_score_has_no_interval() -> None:
    assert t_interval([0.5]) is None


def test_the_paired_test_sees_a_small_constant_gap_that_an_unpaired_one_would_miss() -> None:
    best, other = [0.90, 0.70, 0.80, 0.60], [0.889, 0.691, 0.789, 0.591]
    assert worse(best, other) < 0.001
    assert stats.ttest_ind(best, other, alternative="greater").pvalue > 0.4


def test_the_test_is_one_sided() -> None:
    """Gaps 0, 1, 2: t = 1 / (1 / sqrt(3)), and a t of two degrees has the closed form 1/2 - t / (2
    sqrt(2 + t^2)).
    """
    t = math.sqrt(3)
    assert worse([1, 2, 3], [1, 1, 1]) == pytest.approx(0.5 - t / (2 * math.sqrt(2 + t * t)))
    assert worse([1, 1, 1], [1, 2, 3]) == pytest.approx(0.5 + t / (2 * math.sqrt(2 + t * t)))


def test_the_test_has_its_limits_where_the_gap_is_the_same_with_every_seed() -> None:
    assert worse([0.5, 0.6, 0.7], [0.5, 0.6, 0.7]) == 1.0
    assert worse([0.5, 0.6, 0.7], [0.4, 0.5, 0.6]) == 0.0
    assert worse([0.4, 0.5, 0.6], [0.5, 0.6, 0.7]) == 1.0


def test_holm_s_correction_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []


@settings(
    deadline=None, max_examples=10
)  # statsmodels collects garbage every time, which is slow beside torch
@given(st.lists(st.floats(0, 1), min_size=1, max_size=7))
def test_holm_s_correction_is_that_of_r(p_values: list[float]) -> None:
    """p.adjust(p, "holm") as R defines it: pmin(1, cummax((n + 1 - i) * p[o]))[order(o)]."""
    n, order = len(p_values), sorted(range(len(p_values)), key=p_values.__getitem__)
    steps = [(n - i) * p_values[row] for i, row in enumerate(order)]
    want = {row: min(1.0, max(steps[: i + 1])) for i, row in enumerate(order)}
    assert holm(p_values) == pytest.approx([want[row] for row in range(n)])


def named(table: list[list[float]]) -> tuple[dict[str, list[float]], dict[str, tuple[int, int]]]:
    return (
        {f"row {i}": scores for i, scores in enumerate(table)},
        {f"row {i}": (i, 10 * i) for i in range(len(table))},
    )


@settings(deadline=None, max_examples=10)
@given(TABLES)
def test_a_row_is_worse_if_its_corrected_p_value_is_below_alpha(table: list[list[float]]) -> None:
    scores, sizes = named(table)
    found = rank(scores, sizes)
    assert found is not None
    means = {row: sum(of) / len(of) for row, of in scores.items()}
    assert means[found.best] == pytest.approx(max(means.values()))
    assert {row for row in scores if found.is_worse(row)} == {
        row for row, p in found.p.items() if p < ALPHA
    }
    for row, p in found.p.items():
        assert p >= worse(scores[found.best], scores[row])
    assert rank(dict(reversed(scores.items())), sizes) == found


def test_fewer_than_three_seeds_or_two_rows_are_not_ranked() -> None:
    assert rank(*named([[0.1, 0.2], [0.3, 0.4]])) is None
    assert rank(*named([[0.1, 0.2, 0.3]])) is None
    assert rank({}, {}) is None


def test_a_clear_difference_is_found_whatever_the_sizes_of_the_rows() -> None:
    found = rank(*named([[0.50, 0.51, 0.52], [0.90, 0.92, 0.91]]))
    assert found is not None
    assert found.best == "row 1" and found.is_worse("row 0")


def test_the_examples_find_a_row_worse_though_the_seeds_are_too_few() -> None:
    scores, sizes = named([[0.80, 0.86, 0.80], [0.85, 0.84, 0.85], [0.85, 0.86, 0.84]])
    few = rank(scores, sizes)
    assert few is not None and few.best == "row 2" and not few.is_worse("row 0")
    answers = {
        "row 0": [1.0] * 82 + [0.0] * 18,
        "row 1": [1.0] * 84 + [0.0] * 16,
        "row 2": [1.0] * 85 + [0.0] * 15,
    }
    slight = rank(scores, sizes, answers)
    # Three examples of a hundred may be chance.
    assert slight is not None and not slight.is_worse("row 0")
    many = rank(scores, sizes, {name: right * 20 for name, right in answers.items()})
    assert many is not None and many.is_worse("row 0") and many.p == few.p


def test_answers_of_the_best_row_are_needed_for_the_test_over_examples() -> None:
    scores, sizes = named([[0.80, 0.86, 0.80], [0.85, 0.86, 0.84]])
    found = rank(scores, sizes, {"row 0": [0.0] * 50})
    assert found is not None and not found.on_examples and not found.is_worse("row 0")


def test_the_gap_s_bound_lies_above_the_mean_gap_and_shrinks_with_more_seeds() -> None:
    best, other = [0.9, 0.8, 0.85], [0.88, 0.79, 0.80]
    few, many = gap_bound(best, other), gap_bound(best * 3, other * 3)
    assert sum(a - b for a, b in zip(best, other, strict=True)) / 3 < many < few


def test_the_advice_on_seeds_has_the_power_that_it_promises() -> None:
    best, other = [0.90, 0.80, 0.85, 0.87], [0.895, 0.80, 0.84, 0.868]
    n = seeds_needed(best, other, tests=2)
    assert n is not None
    spread = stats.tstd([a - b for a, b in zip(best, other, strict=True)])

    def power(seeds: int) -> float:
        """By drawing: how often the test sees a gap of 0.01 through this spread."""
        gaps = np.random.default_rng(0).normal(0.01, spread, (40_000, seeds))
        t = gaps.mean(axis=1) / (gaps.std(axis=1, ddof=1) / math.sqrt(seeds))
        return float((t > stats.t.ppf(1 - ALPHA / 2, seeds - 1)).mean())

    assert 3 < n < 20
    assert power(n) > 0.79
    assert power(n - 1) < 0.81
    assert seeds_needed(best, [b - 0.1 for b in best], tests=2) is None
