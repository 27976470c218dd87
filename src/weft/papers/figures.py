"""Parses printed figures (36.8K, 175,255.8M, 72KB, 0.83), and decides whether a count would be
printed the same.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from ..errors import ConfigError

UNITS = ("numbers", "bytes", "percent")
_SCALES = {
    "numbers": {"": 1, "K": 10**3, "M": 10**6},
    "percent": {"": 1},
    "bytes": {"KB": 2**10, "MB": 2**20, "GB": 2**30},
}
_FIGURE = re.compile(r"(\d[\d,]*)(?:\.(\d+))?([KMG]?B?)")


@dataclass(frozen=True)
class Figure:
    """`units` of the last printed digit, each worth `step`: 36.8K is 368 steps of 100."""

    units: int
    step: Fraction

    @property
    def value(self) -> Fraction:
        """The figure as an exact number."""
        return self.units * self.step

    def reading(self, count: Fraction) -> str | None:
        """Returns how `count` gives this figure: "rounded", "truncated", "either way" (both), or
        None.
        """
        exact = count / self.step
        ways = {
            "rounded": int(exact + Fraction(1, 2)) == self.units,
            "truncated": int(exact) == self.units,
        }
        if all(ways.values()):
            return "either way"
        return next((way for way, fits in ways.items() if fits), None)


def figure(printed: str, unit: str) -> Figure:
    """Parses a printed figure. Bytes are counted in powers of 1024, as in the papers. Raises
    ConfigError if it has another form.
    """
    found = _FIGURE.fullmatch(printed)
    if found is None or found[3] not in _SCALES[unit]:
        raise ConfigError(
            f"printed figure {printed!r}: write digits and one of {list(_SCALES[unit])} for {unit}."
        )
    decimals = found[2] or ""
    return Figure(
        int(found[1].replace(",", "") + decimals),
        Fraction(_SCALES[unit][found[3]], 10 ** len(decimals)),
    )
