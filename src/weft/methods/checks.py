"""Checks of the values of configuration fields, whose types are right (field_types.py). Each raises
ConfigError that names the field, its value and the cure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..errors import ConfigError


def check_count(config: Any, field: str, low: int) -> None:
    """Refuses a whole number below `low`. Raises ConfigError."""
    value = getattr(config, field)
    if value < low:
        raise ConfigError(
            f"{type(config).__name__}({field}={value!r}): {field} must be a whole number, {low} or "
            "more."
        )


def check_number(
    config: Any,
    field: str,
    *,
    low: float,
    high: float = math.inf,
    open_low: bool = False,
    open_high: bool = False,
) -> None:
    """Refuses a number that is not finite or not in the range. Raises ConfigError."""
    value, name = getattr(config, field), type(config).__name__
    if (
        math.isfinite(value)
        and (low < value if open_low else low <= value)
        and (value < high if open_high else value <= high)
    ):
        return
    left, right = "(" if open_low else "[", ")" if open_high or high == math.inf else "]"
    raise ConfigError(
        f"{name}({field}={value!r}): {field} must be a number in {left}{low}, {high}{right}."
    )


def check_choice(config: Any, field: str, allowed: Sequence[str]) -> None:
    """Refuses a field of any type that is none of `allowed`. Raises ConfigError."""
    value = getattr(config, field)
    if not isinstance(value, str) or value not in allowed:
        raise ConfigError(
            f"{type(config).__name__}({field}={value!r}): {field} must be one of {list(allowed)}."
        )


def check_alpha(config: Any) -> None:
    """Refuses an alpha that is neither None nor above 0. Raises ConfigError."""
    if config.alpha is not None:
        check_number(config, "alpha", low=0.0, open_low=True)
