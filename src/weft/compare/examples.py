"""How far a method is behind on the test examples, paired: both answered the same ones.

The t-test over seeds asks what other seeds would give on these examples; this asks what these runs
would give on other examples of their kind. One cannot stand for the other, so both are said, and a
row that either finds worse is not recommended.
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
    """Share of the examples by which the other answers fewer right; `interval` is of 95 %, by the
    bootstrap.
    """

    mean: float
    interval: tuple[float, float]
    examples: int


def gap(best: Sequence[str], other: Sequence[str]) -> Gap | None:
    """From answers by seed, "1" right and "0" wrong, in the order of the examples; None where they
    are not the same ones.

    An example counts with its mean over the seeds; examples are drawn with replacement and keep all
    their answers.
    """
    lengths = {len(answers) for answers in (*best, *other)}
    if len(lengths) != 1 or min(lengths) < 2 or len(best) != len(other):
        return None
    behind = shares(best) - shares(other)
    mean = float(behind.mean())
    if np.ptp(behind) == 0:  # no example tells them apart
        return Gap(mean, (mean, mean), len(behind))
    from scipy import stats

    found = stats.bootstrap(
        (behind,),
        np.mean,
        confidence_level=CONFIDENCE,
        n_resamples=RESAMPLES,
        batch=BATCH,
        method="percentile",
        random_state=np.random.default_rng(0),
    ).confidence_interval
    return Gap(mean, (float(found.low), float(found.high)), len(behind))


def shares(answers: Sequence[str]) -> NDArray[np.float64]:
    """Of every example the share of the seeds that were right."""
    marks = np.array([[int(mark) for mark in seed] for seed in answers], dtype=np.float64)
    return np.asarray(marks.mean(axis=0))
