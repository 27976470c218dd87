"""What a paper prints, read as a number, and which counts print like it."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

import weft
from weft.papers.figures import figure


@pytest.mark.parametrize(
    ("printed", "unit", "value"),
    [
        ("36.8K", "numbers", 36_800),
        ("175,255.8M", "numbers", 175_255_800_000),
        ("3M", "numbers", 3_000_000),
        ("72KB", "bytes", 72 * 1024),
        ("4.6GB", "bytes", Fraction(46, 10) * 2**30),
        ("0.80", "percent", Fraction(8, 10)),
    ],
)
def test_a_figure_is_read_with_its_unit(printed, unit, value):
    assert figure(printed, unit).value == value


@pytest.mark.parametrize(
    ("printed", "unit"),
    [
        ("36.8K", "bytes"),
        ("12", "bytes"),
        ("1MB", "numbers"),
        ("x", "numbers"),
        ("3M", "percent"),
        ("", "percent"),
    ],
)
def test_what_is_no_figure_is_refused(printed, unit):
    with pytest.raises(weft.ConfigError, match="printed figure"):
        figure(printed, unit)


@pytest.mark.parametrize(
    ("count", "printed", "reading"),
    [
        (36_864, "36.8K", "truncated"),
        (36_864, "36.9K", "rounded"),
        (36_820, "36.8K", "either way"),
        (36_900, "36.8K", None),
        (36_799, "36.8K", "rounded"),
        (36_750, "36.8K", "rounded"),
        (36_749, "36.8K", None),
        (36_899, "36.8K", "truncated"),
    ],
)
def test_a_count_prints_rounded_truncated_either_way_or_not_at_all(count, printed, reading):
    assert figure(printed, "numbers").reading(Fraction(count)) == reading


@given(st.integers(0, 10**12), st.integers(1, 3))
def test_every_count_reads_as_its_own_rounding_and_truncation_and_no_further_figure(
    count, decimals
):
    step = 10 ** (6 - decimals)
    down = count // step
    texts = [
        f"{(down + i) // 10**decimals}.{(down + i) % 10**decimals:0{decimals}d}M" for i in range(3)
    ]
    low, high, far = (figure(text, "numbers").reading(Fraction(count)) for text in texts)
    rounds_up = 2 * (count - down * step) >= step
    assert (low, high, far) == (("truncated", "rounded") if rounds_up else ("either way", None)) + (
        None,
    )
