"""Rows of an input, gathered once for all layers that read the same input (q, k and v; gate and up), and their products
with an A that these layers share.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_last = threading.local()


class Gathered:
    """Of x [rows, ..., in]: what was gathered of it, until x is gone or has been written to."""

    def __init__(self, key: tuple[Any, ...]) -> None:
        self.key = key
        self._found: dict[Any, Any] = {}

    def rows(self, x: Tensor, rows: Sequence[int]) -> tuple[Tensor | None, Tensor]:
        """These rows' numbers as a tensor, and x there; None where they are all rows as they stand."""
        key = tuple(rows)
        if key == tuple(range(x.shape[0])):
            return None, x
        if key not in self._found:
            index = torch.tensor(key, device=x.device)
            self._found[key] = index, x[index]
        found: tuple[Tensor, Tensor] = self._found[key]
        return found

    def down(self, some_x: Tensor, A: Tensor) -> Tensor:
        """some_x Aᵀ [..., r] for rows that `rows` gave and an A that does not train."""
        key = id(some_x), A.data_ptr(), A._version, A.shape, A.stride()
        if key not in self._found:
            self._found[key] = some_x, torch.nn.functional.linear(some_x, A.to(some_x.dtype))  # held, so its id is its own
        found: Tensor = self._found[key][1]
        return found


def gathered(x: Tensor) -> Gathered:
    """What this thread has gathered of x."""
    if x.is_inference() or torch.compiler.is_compiling():
        return Gathered(())
    key = x._version, torch.is_grad_enabled()
    held: tuple[Any, Gathered] | None = getattr(_last, "held", None)
    if held is None or held[0]() is not x or held[1].key != key:
        held = weakref.ref(x, _forget), Gathered(key)
        _last.held = held
    return held[1]


def _forget(gone: Any) -> None:
    held = getattr(_last, "held", None)
    if held is not None and held[0] is gone:
        _last.held = None
