"""Intervals and paired tests.

The rows are paired: with one seed, every method starts from the same head and sees the same
batches. Each method is tested against the one with the highest mean (one-sided paired t-test: is it
worse?), with Holm's correction over these tests. If the correct answers are known per test example,
the same test is applied to the examples: few seeds can only show large gaps, many examples show
smaller ones. That neither test finds a row worse (verdict.py recommends the smallest such) is weaker
than "as good", since there may be too little data to see a gap; the report therefore always states
a bound on the gap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean, stdev

import numpy as np

ALPHA = 0.05
MIN_SEEDS = 3
SAME = 1e-12  # differences of scores closer than this are rounding
POWER = 0.8
GAP = 0.01  # the gap that the advice on more seeds is about


@dataclass(frozen=True)
class Ranking:
    """`p` are Holm-corrected p-values of "worse than `best`" over the seeds, for every other row.
    `on_examples` are those over the test examples, for rows with known answers.
    """

    best: str
    p: Mapping[str, float]
    on_examples: Mapping[str, float] = field(default_factory=dict)

    def is_worse(self, row: str) -> bool:
        """Returns True if one of the two tests finds the row worse than the best."""
        return row != self.best and min(self.p[row], self.on_examples.get(row, 1.0)) < ALPHA


def t_interval(scores: Sequence[float]) -> tuple[float, float] | None:
    """Returns the two-sided 95 % Student interval of the mean, or None for fewer
    than two scores.
    """
    if len(scores) < 2:
        return None
    from statsmodels.stats.weightstats import DescrStatsW

    low, high = DescrStatsW(list(scores)).tconfint_mean(alpha=ALPHA)
    return float(low), float(high)


def worse(best: Sequence[float], other: Sequence[float]) -> float:
    """Returns the one-sided p-value of the paired t-test of "other is worse than best".

    If all differences are equal, the t-statistic has no spread to divide by, and scipy returns nan
    or a rounding error. Its limits are used: 1 if there is no difference or other is better, 0 if
    other is worse by the same amount with every seed.
    """
    gaps = [a - b for a, b in zip(best, other, strict=True)]
    if max(gaps) - min(gaps) <= SAME:
        return 0.0 if gaps[0] > SAME else 1.0
    from scipy import stats

    return float(stats.ttest_rel(best, other, alternative="greater").pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns the p-values with Holm's step-down correction, in the same order."""
    if not p_values:
        return []
    from statsmodels.stats.multitest import multipletests

    return [float(p) for p in multipletests(list(p_values), alpha=ALPHA, method="holm")[1]]


def rank(
    scores: Mapping[str, Sequence[float]],
    sizes: Mapping[str, tuple[int, int]],
    answers: Mapping[str, Sequence[float]] | None = None,
) -> Ranking | None:
    """Returns the best row and the p-values of all others; None for fewer than three seeds or two
    rows.

    `sizes` has (trained parameters, bytes on disk) per row; if means are equal, the smaller row is
    better. `answers` has, per test example, the share of the seeds that were right, for rows with
    known answers.
    """
    if len(scores) < 2 or min(len(s) for s in scores.values()) < MIN_SEEDS:
        return None
    best = min(scores, key=lambda row: (-round(mean(scores[row]), 12), sizes[row]))
    return Ranking(best, _worse_than(best, scores), _worse_than(best, answers or {}))


def _worse_than(best: str, paired: Mapping[str, Sequence[float]]) -> dict[str, float]:
    others = [row for row in paired if row != best and best in paired]
    return dict(
        zip(others, holm([worse(paired[best], paired[row]) for row in others]), strict=True)
    )


def gap_bound(best: Sequence[float], other: Sequence[float]) -> float:
    """Returns the upper bound of the mean gap at 95 % one-sided confidence."""
    from statsmodels.stats.weightstats import DescrStatsW

    gaps = [a - b for a, b in zip(best, other, strict=True)]
    return max(0.0, float(DescrStatsW(gaps).tconfint_mean(alpha=ALPHA, alternative="smaller")[1]))


def seeds_needed(
    best: Sequence[float], other: Sequence[float], tests: int, gap: float = GAP
) -> int | None:
    """Returns about how many seeds would show a gap of `gap` with 80 % power at alpha / tests; None
    if all differences are equal.

    101 means more than 100. The power is computed per number of seeds, because statsmodels'
    `solve_power` returns fractions and fails if few seeds are enough.
    """
    spread = stdev([a - b for a, b in zip(best, other, strict=True)])
    if spread <= SAME:
        return None
    from statsmodels.stats.power import TTestPower

    seeds = np.arange(MIN_SEEDS, 101)
    powers = TTestPower().power(gap / spread, seeds, ALPHA / max(1, tests), alternative="larger")
    enough = seeds[powers >= POWER]
    return int(enough[0]) if len(enough) else 101
