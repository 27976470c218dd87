"""Paired gaps between methods over the test examples.

The t-test over the seeds asks what other seeds would give on these examples. This asks what these
runs would give on other examples of the same kind. The questions differ, so both answers are
reported, and a row that either finds worse is not recommended.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES, BATCH = 9999, 100
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Gap:
    """Share of the examples by which the other method has fewer correct; `interval` is its 95 %
    bootstrap interval.
    """

    mean: float
    interval: tuple[float, float]
    examples: int


def gap(best: Sequence[str], other: Sequence[str]) -> Gap | None:
    """Returns the gap between two methods, or None if their examples differ.

    `best` and `other` have one string per seed, "1" for right and "0" for wrong, in the order of
    the examples. An example counts with its mean over the seeds. Examples are drawn with
    replacement, each with all its answers.
    """
    lengths = {len(answers) for answers in (*best, *other)}
    if len(lengths) != 1 or min(lengths) < 2 or len(best) != len(other):
        return None
    behind = shares(best) - shares(other)
    mean = float(behind.mean())
    if np.ptp(behind) == 0:  # no example tells them apart
        return Gap(mean, (mean, mean), len(behind))
    from scipy import stats

    interval = stats.bootstrap(
        (behind,),
        np.mean,
        confidence_level=CONFIDENCE,
        n_resamples=RESAMPLES,
        batch=BATCH,
        method="percentile",
        random_state=np.random.default_rng(0),
    ).confidence_interval
    return Gap(mean, (float(interval.low), float(interval.high)), len(behind))


def shares(answers: Sequence[str]) -> NDArray[np.float64]:
    """Returns the share of the seeds that were right, per example: [examples]."""
    marks = np.array([[int(mark) for mark in seed] for seed in answers], dtype=np.float64)
    return np.asarray(marks.mean(axis=0))
