"""Weft's count of the norms that it computed, if the installed Weft has one."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module


def norm_counter() -> Callable[[], int] | None:
    """A function that reads how often DoRA's norm was computed in this process; None where Weft
    does not count.
    """
    try:
        counts = import_module("weft.ops.cache").counts
    except (ImportError, AttributeError):
        return None
    return lambda: int(counts["norm"])
