"""Every name of Weft that is not public and that the benchmarks use: if the library's inside
changes, this file follows, and no other one here.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from torch import Tensor


def norm_counter() -> Callable[[], int] | None:
    """Returns a function that reads how many norms DoRA has computed in this process, or None if
    Weft does not count them.
    """
    try:
        counts = import_module("weft.ops.cache").counts
    except (ImportError, AttributeError):
        return None
    return lambda: int(counts["norm"])


def dot(g: Tensor, y: Tensor) -> Tensor:
    """Returns the sum over tokens of g * y, as Weft computes it for DoRA's magnitude.

    g, y [tokens, out] -> [out].
    """
    found: Tensor = import_module("weft.ops.fused")._dot(g, y)
    return found


def bottleneck_presets() -> Any:
    """Returns the presets of `weft.Bottleneck` by name."""
    return import_module("weft.methods.bottleneck").PRESETS
