"""The relation of delta M to delta D: Pearson's correlation, and the slope of delta M on delta D.

Points are (delta D, delta M) of one matrix at one checkpoint. The paper's correlation, pooled over
both, mixes two relations that can have opposite signs. So each is computed separately too:

pooled    all points between   one point per matrix, its mean over the checkpoints: do matrices that
turn more also grow more? within    each point minus its matrix's mean: when a matrix turns further,
does it also grow?

Intervals are of 95 %. Points of one matrix are not independent, so the pooled interval is a
percentile bootstrap over whole matrices; with fewer than `FEWEST` there is none. For between and
within, r has Fisher's z interval with 1/sqrt(df - 1) as its standard error, and the slope has
Student's, with df = matrices - 2 and points - matrices - 1 (repeated measures correlation; Bland
and Altman 1995).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEVELS = ("pooled", "between", "within")
FEWEST = 5  # matrices for a bootstrap
DRAWS, SEED = 4000, 0
SAME = 1e-12  # smaller differences are rounding errors

Interval = tuple[float, float]


@dataclass(frozen=True)
class Relation:
    """One level. A value that cannot be computed is None, with the reason in `why`.

    `r` and `slope` have intervals; `points` is the number of points, `units` that of matrices.
    """

    level: str
    points: int
    units: int
    r: float | None = None
    r_interval: Interval | None = None
    slope: float | None = None
    slope_interval: Interval | None = None
    why: str = ""

    @property
    def sign(self) -> str:
        """ "positive" or "negative" if the interval of r is on one side of 0, "unclear" if not,
        "none" without r.
        """
        if self.r is None or self.r_interval is None:
            return "none"
        low, high = self.r_interval
        return "positive" if low > 0 else "negative" if high < 0 else "unclear"


def relate(units: Sequence[str], d: Sequence[float], m: Sequence[float]) -> list[Relation]:
    """Returns the three levels, from each point's matrix, delta D and delta M. Raises ValueError if
    the lengths differ.
    """
    if not len(units) == len(d) == len(m):
        raise ValueError(f"relate: {len(units)} names, {len(d)} delta D and {len(m)} delta M.")
    groups: dict[str, list[tuple[float, float]]] = {}
    for unit, point in zip(units, zip(d, m, strict=True), strict=True):
        groups.setdefault(unit, []).append(point)
    ordered = sorted(
        map(sorted, groups.values())
    )  # so that names and order change nothing, not even random draws
    place = np.repeat(np.arange(len(ordered)), [len(group) for group in ordered])
    x, y = (
        np.array([point for group in ordered for point in group], dtype=np.float64).reshape(-1, 2).T
    )
    size = np.bincount(place, minlength=len(ordered))
    x_mean, y_mean = (np.bincount(place, t, len(ordered)) / size for t in (x, y))
    n, k = len(x), len(ordered)
    return [
        _pooled(x, y, place, k),
        _simple("between", x_mean, y_mean, k - 2, k, k),
        _simple("within", x - x_mean[place], y - y_mean[place], n - k - 1, n, k),
    ]


def _simple(level: str, x: np.ndarray, y: np.ndarray, df: int, n: int, k: int) -> Relation:
    if df < 1:
        return Relation(
            level, n, k, why="one checkpoint" if level == "within" and n == k else "too few points"
        )
    found = _fit(x, y)
    if found is None:
        return Relation(level, n, k, why="no spread")
    from scipy import stats

    r, slope = found
    half = float(stats.norm.ppf(0.975)) / math.sqrt(df - 1) if df > 1 else math.inf
    z = math.atanh(max(-1 + 1e-15, min(1 - 1e-15, r)))
    error = math.sqrt(max(0.0, 1 - r * r) / df * _square(y) / _square(x))
    reach = float(stats.t.ppf(0.975, df)) * error
    return Relation(
        level,
        n,
        k,
        r,
        (math.tanh(z - half), math.tanh(z + half)),
        slope,
        (slope - reach, slope + reach),
    )


def _pooled(x: np.ndarray, y: np.ndarray, place: np.ndarray, k: int) -> Relation:
    if len(x) < 3:
        return Relation("pooled", len(x), k, why="too few points")
    found = _fit(x, y)
    if found is None:
        return Relation("pooled", len(x), k, why="no spread")
    if k < FEWEST:
        return Relation(
            "pooled",
            len(x),
            k,
            found[0],
            None,
            found[1],
            None,
            f"no interval: fewer than {FEWEST} matrices",
        )
    x, y = x - x.mean(), y - y.mean()
    sums = np.stack(
        [np.bincount(place, t, k) for t in (np.ones_like(x), x, y, x * x, x * y, y * y)], axis=1
    )
    drawn = np.random.default_rng(SEED).multinomial(k, [1 / k] * k, size=DRAWS) @ sums
    n, sx, sy, sxx, sxy, syy = drawn.T
    sxx, sxy, syy = sxx - sx * sx / n, sxy - sx * sy / n, syy - sy * sy / n
    spread = (sxx > SAME * _square(x)) & (syy > SAME * _square(y))
    sxx, sxy, syy = sxx[spread], sxy[spread], syy[spread]
    r, slope = (_middle(t) for t in (sxy / np.sqrt(sxx * syy), sxy / sxx))
    return Relation("pooled", len(x), k, found[0], r, found[1], slope)


def _fit(x: np.ndarray, y: np.ndarray) -> tuple[float, float] | None:
    """r and slope; None if one of the two is constant."""
    x, y = x - x.mean(), y - y.mean()
    if max(abs(x)) <= SAME or max(abs(y)) <= SAME:
        return None
    both = float(x @ y)
    return max(-1.0, min(1.0, both / math.sqrt(_square(x) * _square(y)))), both / _square(x)


def _square(t: np.ndarray) -> float:
    """Sum of squares about the mean."""
    return float(((t - t.mean()) ** 2).sum())


def _middle(values: np.ndarray) -> Interval:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
