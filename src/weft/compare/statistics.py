"""Intervals, paired tests and the recommendation.

The rows are paired: with one seed, every method starts from the same head and sees the same batches. Each method is
tested against the one with the highest mean (one-sided paired t-test: is it worse?), with Holm's correction over these
tests. The recommended method is the smallest that is not significantly worse. That is weaker than "as good": it can
also mean that the test had too few seeds to see a gap, so the bound on the gap is always said beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

ALPHA = 0.05
MIN_SEEDS = 3
SAME = 1e-12  # differences of scores closer than this are rounding
GAP = 0.01  # the gap that the advice on more seeds is about


@dataclass(frozen=True)
class Ranking:
    """`p` holds the Holm-corrected p-value of "worse than `best`" for every other row."""

    best: str
    p: Mapping[str, float]
    recommended: str


def t_interval(scores: Sequence[float], confidence: float = 0.95) -> tuple[float, float] | None:
    """Two-sided Student interval of the mean; None for fewer than two scores."""
    if len(scores) < 2:
        return None
    from scipy import stats

    half = float(stats.t.ppf(0.5 + confidence / 2, len(scores) - 1)) * stdev(scores) / math.sqrt(len(scores))
    return mean(scores) - half, mean(scores) + half


def worse(best: Sequence[float], other: Sequence[float]) -> float:
    """One-sided p-value of the paired t-test of "other is worse than best".

    Where all differences are the same the t-statistic has no spread to divide by. Its limits are taken: 1 if there is
    no difference or other is better, 0 if other is worse by the same amount with every seed.
    """
    gaps = [a - b for a, b in zip(best, other, strict=True)]
    if max(gaps) - min(gaps) <= SAME:
        return 0.0 if gaps[0] > SAME else 1.0
    from scipy import stats

    return float(stats.ttest_rel(best, other, alternative="greater").pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: the i-th smallest of n times n - i, never below a smaller one; in the order given."""
    corrected, floor = [0.0] * len(p_values), 0.0
    for place, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        floor = corrected[i] = max(floor, min(1.0, (len(p_values) - place) * p_values[i]))
    return corrected


def rank(scores: Mapping[str, Sequence[float]], sizes: Mapping[str, tuple[int, int]]) -> Ranking | None:
    """The best row, who is worse, and the smallest row that is not; None below three seeds or two rows.

    sizes: (trained numbers of the method, bytes on disk) by row. Ties of the mean go to the smaller row.
    """
    if len(scores) < 2 or min(len(s) for s in scores.values()) < MIN_SEEDS:
        return None
    best = min(scores, key=lambda row: (-round(mean(scores[row]), 12), sizes[row]))
    others = [row for row in scores if row != best]
    p = dict(zip(others, holm([worse(scores[best], scores[row]) for row in others]), strict=True))
    equal = [best, *(row for row in others if p[row] >= ALPHA)]
    return Ranking(best, p, min(equal, key=lambda row: sizes[row]))


def gap_bound(best: Sequence[float], other: Sequence[float]) -> float:
    """The largest mean gap that 95 % one-sided confidence leaves open."""
    gaps = [a - b for a, b in zip(best, other, strict=True)]
    if max(gaps) - min(gaps) <= SAME:
        return max(0.0, gaps[0])
    from scipy import stats

    half = float(stats.t.ppf(1 - ALPHA, len(gaps) - 1)) * stdev(gaps) / math.sqrt(len(gaps))
    return max(0.0, mean(gaps) + half)


def seeds_needed(best: Sequence[float], other: Sequence[float], tests: int, gap: float = GAP) -> int | None:
    """About how many seeds would show a gap of `gap` with 80 % power at alpha / tests; None where it cannot be told.

    101 stands for more than 100.
    """
    spread = stdev([a - b for a, b in zip(best, other, strict=True)])
    if spread <= SAME:
        return None
    from scipy import stats

    for n in range(MIN_SEEDS, 101):
        critical = stats.t.ppf(1 - ALPHA / max(1, tests), n - 1)
        if stats.nct.sf(critical, n - 1, gap / spread * math.sqrt(n)) >= 0.8:  # the power of the one-sided test
            return n
    return 101
