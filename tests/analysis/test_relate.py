"""Correlation and slope at three levels, held against scipy and against relations that are put
in.
"""

import numpy as np
import pytest
from scipy import stats

from weft.analysis import relate

KEYS = ["pooled", "between", "within"]


def points(between, within, units=12, steps=5, noise=0.02, seed=0):
    """Matrices with means on a line of slope `between`, each moving along a line of slope
    `within`.
    """
    rng = np.random.default_rng(seed)
    names, x, y = [], [], []
    for unit in range(units):
        at = rng.uniform(1, 3)
        for step in np.linspace(-0.4, 0.4, steps):
            names.append(f"layer.{unit}")
            x.append(at + step)
            y.append(5 + between * at + within * step + noise * rng.normal())
    return names, x, y


def levels(*given):
    return dict(zip(KEYS, relate(*given), strict=True))


def test_each_level_finds_its_own_sign_where_they_differ():
    found = levels(*points(between=1.0, within=-2.0))
    assert found["between"].sign == "positive" and found["within"].sign == "negative"
    assert found["between"].slope == pytest.approx(1.0, abs=0.1) and found[
        "within"
    ].slope == pytest.approx(-2.0, abs=0.1)
    assert found["within"].r < -0.95 < 0.95 < found["between"].r


def test_pooled_and_between_are_scipys():
    names, x, y = points(0.3, 0.4, noise=0.5)
    found = levels(names, x, y)
    line = stats.linregress(x, y)
    assert (found["pooled"].r, found["pooled"].slope) == pytest.approx(
        (line.rvalue, line.slope), rel=1e-10
    )
    means = [
        (
            np.mean([a for n, a in zip(names, x, strict=True) if n == name]),
            np.mean([b for n, b in zip(names, y, strict=True) if n == name]),
        )
        for name in dict.fromkeys(names)
    ]
    between, line = (
        stats.pearsonr(*zip(*means, strict=True)),
        stats.linregress(*zip(*means, strict=True)),
    )
    assert found["between"].r == pytest.approx(between.statistic, rel=1e-10)
    assert found["between"].r_interval == pytest.approx(
        tuple(between.confidence_interval()), rel=1e-9
    )
    reach = stats.t.ppf(0.975, len(means) - 2) * line.stderr
    assert found["between"].slope_interval == pytest.approx(
        (line.slope - reach, line.slope + reach), rel=1e-9
    )


def test_within_is_the_regression_with_an_intercept_for_each_matrix():
    names, x, y = points(0.3, 0.4, noise=0.5)
    design = np.column_stack(
        [x, *(np.array([n == name for n in names], float) for name in dict.fromkeys(names))]
    )
    wanted, left, _, _ = np.linalg.lstsq(design, np.array(y), rcond=None)
    found = levels(names, x, y)["within"]
    assert found.slope == pytest.approx(wanted[0], rel=1e-9)
    df = len(x) - 12 - 1
    error = np.sqrt(left[0] / df * np.linalg.inv(design.T @ design)[0, 0])
    reach = stats.t.ppf(0.975, df) * error
    assert found.slope_interval == pytest.approx((wanted[0] - reach, wanted[0] + reach), rel=1e-9)


def test_the_order_of_points_and_the_names_of_matrices_change_nothing():
    names, x, y = points(1.0, -1.0)
    order = np.random.default_rng(1).permutation(len(x))
    mixed = relate([names[i] for i in order], [x[i] for i in order], [y[i] for i in order])
    for one, other in zip(relate(names, x, y), mixed, strict=True):
        assert (one.points, one.units, one.sign) == (other.points, other.units, other.sign)
        for key in ("r", "slope", "r_interval", "slope_interval"):
            assert getattr(one, key) == pytest.approx(getattr(other, key), rel=1e-9), (
                one.level,
                key,
            )


def test_intervals_cover_what_is_true_about_as_often_as_they_say():
    """Of matrices without any relation, about 5 % are called positive or negative at each level."""
    rng = np.random.default_rng(0)
    called = dict.fromkeys(KEYS, 0)
    for trial in range(200):
        names = [f"{unit}" for unit in range(24) for _ in range(4)]
        drift = np.repeat(rng.normal(size=(2, 24)), 4, axis=1)
        x, y = drift + 0.5 * rng.normal(size=(2, 96))
        for relation in relate(names, x.tolist(), y.tolist()):
            called[relation.level] += relation.sign in ("positive", "negative")
        assert trial < 200
    assert all(2 <= count <= 28 for count in called.values()), (
        called
    )  # 10 expected; the bootstrap is a little narrow


def test_points_of_one_matrix_are_not_counted_as_independent():
    """A hundred copies of six points say no more than six points."""
    x, y = [1, 2, 3, 4, 5, 6.0], [2, 1, 4, 3, 6, 4.0]
    names = list("abcdef")
    once, often = levels(names, x, y)["pooled"], levels(names * 100, x * 100, y * 100)["pooled"]
    assert often.points == 600 and often.r == pytest.approx(once.r)
    assert often.r_interval == pytest.approx(once.r_interval, abs=0.05)


@pytest.mark.parametrize(
    ("steps", "units", "level", "why"),
    [
        (1, 8, "within", "one checkpoint"),
        (4, 1, "between", "too few"),
        (4, 2, "between", "too few"),
        (4, 3, "pooled", "fewer"),
    ],
)
def test_what_cannot_be_said_is_not_said(steps, units, level, why):
    found = levels(*points(1.0, 1.0, units=units, steps=steps))[level]
    assert found.r_interval is None and why in found.why and found.sign == "none"


def test_values_that_do_not_vary_have_no_correlation():
    names, x, y = points(1.0, 1.0)
    assert all(
        relation.r is None and relation.why == "no spread"
        for relation in relate(names, x, [0.5] * len(y))
    )
    exact = levels(names, x, [2 * v for v in x])
    assert exact["pooled"].r == pytest.approx(1.0) and exact["pooled"].slope == pytest.approx(2.0)
    with pytest.raises(ValueError, match="names"):
        relate(names, x, y[:-1])
