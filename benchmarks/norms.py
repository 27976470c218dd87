"""Weft's count of the norms that it computed, if the installed Weft has one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from weft.ops import magnitude

NAMES = ("norms_computed", "computed", "counter", "count")


def norm_counter() -> Callable[[], int] | None:
    """A function that reads the count, from a number, a function or an object with `count` in `weft.ops.magnitude`."""
    for name in NAMES:
        value = getattr(magnitude, name, None)
        if value is not None:
            return lambda found=name: _read(getattr(magnitude, found))  # type: ignore[misc]
    return None


def _read(value: Any) -> int:
    value = getattr(value, "count", value)
    return int(value() if callable(value) else value)
