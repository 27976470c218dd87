"""Rows of an input, gathered once for all layers that read the same input (q, k and v; gate and
up), and their products with an A that these layers share.
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
    """Of x as n rows [n, tokens, in]: what was gathered of it, until x is gone or has been written
    to.
    """

    def __init__(self, n: int, version: int | None = None) -> None:
        self.n, self.version = n, version
        self._found: dict[Any, Any] = {}

    def rows(self, x: Tensor, rows: Sequence[int]) -> tuple[Tensor | None, Tensor]:
        """These rows' numbers as a tensor, and x [n, tokens, in] there; None where they are all
        rows as they stand.
        """
        key = tuple(rows)
        if key == tuple(range(self.n)):
            return None, x
        if key not in self._found:
            index = torch.tensor(key, device=x.device)
            self._found[key] = index, x[index]
        found: tuple[Tensor, Tensor] = self._found[key]
        return found

    def down(self, some_x: Tensor, rows: Sequence[int], A: Tensor) -> Tensor:
        """some_x Aᵀ [..., r] for what `rows` gave of these rows, and an A that does not train."""
        key = tuple(rows), A.data_ptr(), A._version, A.shape, A.stride()
        if key not in self._found:
            self._found[key] = torch.nn.functional.linear(some_x, A.to(some_x.dtype))
        found: Tensor = self._found[key]
        return found


def gathered(x: Tensor, n: int) -> Gathered:
    """What this thread has gathered of x as n rows. With gradients nothing is shared: a second
    backward pass over the same input would go through a graph that the first has freed.
    """
    if torch.is_grad_enabled() or x.is_inference():
        return Gathered(n)
    held: tuple[Any, Gathered] | None = getattr(_last, "held", None)
    if held is None or held[0]() is not x or (held[1].n, held[1].version) != (n, x._version):
        held = weakref.ref(x, _forget), Gathered(n, x._version)
        _last.held = held
    return held[1]


def _forget(gone: Any) -> None:
    held = getattr(_last, "held", None)
    if held is not None and held[0] is gone:
        _last.held = None
