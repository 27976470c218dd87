"""Checks of single values of a configuration; their errors name the key and the nearest value."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from difflib import get_close_matches
from typing import Any

from ...errors import ConfigError


def nearest(name: str, known: Collection[str], prefix: str = "") -> str:
    """Returns a sentence with the known names closest to `name`, or with all of them."""
    near = get_close_matches(name, known, n=2, cutoff=0.5)
    if near:
        return f"Nearest: {', '.join(prefix + n for n in near)}."
    return f"Known: {', '.join(known)}."


def one_of(config: Any, name: str, allowed: Sequence[str]) -> None:
    """Raises ConfigError unless the field is one of the allowed values."""
    value = getattr(config, name)
    if value not in allowed:
        near = get_close_matches(str(value), allowed, n=1)
        raise ConfigError(
            f"{_section(config)}.{name}={value!r} is not one of {', '.join(allowed)}. "
            + (f"Nearest: {near[0]}." if near else "")
        )


def within(
    config: Any,
    name: str,
    low: float,
    high: float = math.inf,
    *,
    open_low: bool = False,
    open_high: bool = False,
) -> None:
    """Raises ConfigError unless the field is finite and between `low` and `high`. The limits are
    included unless open_low or open_high is given.
    """
    value = getattr(config, name)
    if (
        math.isfinite(value)
        and (low < value if open_low else low <= value)
        and (value < high if open_high else value <= high)
    ):
        return
    above = f"above {low:g}" if open_low else f"{low:g} or more"
    below = "" if high == math.inf else f" and {'below' if open_high else 'at most'} {high:g}"
    raise ConfigError(f"{_section(config)}.{name}={value!r}: it must be {above}{below}.")


def _section(config: Any) -> str:
    return type(config).__name__.removesuffix("Section").lower()
