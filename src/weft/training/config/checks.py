"""Checks of single values of a configuration; their errors name the key and the nearest value."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from difflib import get_close_matches
from typing import Any

from ...errors import ConfigError
from ...methods.field_types import WrongType, conform, hints_of, short


def nearest(name: str, known: Collection[str], prefix: str = "") -> str:
    """Returns a sentence with the known names closest to `name`, or with all of them."""
    near = get_close_matches(name, known, n=2, cutoff=0.5)
    if near:
        return f"Nearest: {', '.join(prefix + n for n in near)}."
    return f"Known: {', '.join(known)}."


class Section:
    """The base of the sections: their values have the types of their annotations. A whole number
    becomes a float where one is wanted.
    """

    def __post_init__(self) -> None:
        """Raises ConfigError, which names the key."""
        cls: Any = type(self)
        for name, hint in hints_of(cls).items():
            given = getattr(self, name)
            try:
                value = conform(hint, given)
            except WrongType as error:
                raise ConfigError(
                    f"{dotted_key(self, name)}={short(given)}: write {error}."
                ) from None
            if type(value) is int and hint in (float, float | None):
                value = float(value)
            object.__setattr__(self, name, value)


def one_of(config: Any, name: str, allowed: Sequence[str]) -> None:
    """Raises ConfigError unless the field is one of the allowed values."""
    value = getattr(config, name)
    if value not in allowed:
        near = get_close_matches(str(value), allowed, n=1)
        raise ConfigError(
            f"{dotted_key(config, name)}={value!r} is not one of {', '.join(allowed)}. "
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
    raise ConfigError(f"{dotted_key(config, name)}={value!r}: it must be {above}{below}.")


def dotted_key(config: Any, name: str) -> str:
    """Returns the dotted key of a section's field: "train.steps"."""
    section = type(config).__name__
    return f"{section.removesuffix('Section').lower()}.{name}" if section != "RunConfig" else name
