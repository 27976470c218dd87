"""Products computed once for all layers that read the same input (q, k and v; gate and up).

`SharedDown` keeps x Aᵀ for an A that these layers share (VeRA); `gathered` keeps rows of an input and
their products in a mixed batch.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .cache import Cache, counts

_last = threading.local()


class SharedDown:
    """x Aᵀ [..., r] for the last input x and a view A of one frozen matrix. A copy starts empty."""

    def __init__(self) -> None:
        self._cast = Cache()
        self._last: tuple[Any, tuple[Any, ...], Tensor] | None = None

    def __reduce__(self) -> Any:
        return SharedDown, ()

    def __call__(self, x: Tensor, A: Tensor, detached: bool) -> Tensor:
        """Returns x Aᵀ [..., r] for x [..., in] and A [r, in], with or without the gradient of x.

        The product is kept until x is freed or modified, or a backward pass has gone through it.
        """
        version = None if x.is_inference() else x._version
        key = (
            version,
            A.data_ptr(),
            A._version,
            A.shape,
            A.dtype,
            detached,
            torch.is_grad_enabled(),
            threading.get_ident(),
        )
        last = self._last
        if last is not None and last[0]() is x and last[1] == key and version is not None:
            return last[2]
        counts["A x"] += 1
        source = x.detach() if detached else x
        h = torch.nn.functional.linear(source, self._in_dtype(A, x.dtype))
        reader = weakref.ref(x, self._forget)
        self._last = (reader, key, h)
        if h.requires_grad:  # a backward pass frees its graph, and x may be read again after it
            h.register_hook(lambda grad: self._forget(reader))  # type: ignore[no-untyped-call]
        return h

    def _in_dtype(self, A: Tensor, dtype: torch.dtype) -> Tensor:
        if A.dtype == dtype:
            return A
        whole = A if A._base is None else A._base
        narrow: Tensor = self._cast.get(f"A in {dtype}", (), (whole,), lambda: whole.to(dtype))
        return narrow[: A.shape[0], : A.shape[1]]

    def _forget(self, gone: Any) -> None:
        if self._last is not None and self._last[0] is gone:
            self._last = None


class Gathered:
    """Rows gathered from x [n, tokens, in] and their products, kept until x is freed or modified."""

    def __init__(self, n: int, version: int | None = None) -> None:
        self.n, self.version = n, version
        self._found: dict[Any, Any] = {}

    def rows(self, x: Tensor, rows: Sequence[int]) -> tuple[Tensor | None, Tensor]:
        """Returns the rows' indices [k] and x[rows] [k, tokens, in]; or None and x itself if they
        are all rows in order.
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
        """Returns some_x Aᵀ [..., r] for the x that `rows` returned for these rows, and a frozen A
        [r, in].
        """
        key = tuple(rows), A.data_ptr(), A._version, A.shape, A.stride()
        if key not in self._found:
            self._found[key] = torch.nn.functional.linear(some_x, A.to(some_x.dtype))
        found: Tensor = self._found[key]
        return found


def gathered(x: Tensor, n: int) -> Gathered:
    """Returns this thread's cache of rows gathered from x, seen as [n, tokens, in].

    With gradients nothing is shared: a second backward pass over the same input would go through a
    graph that the first has freed.
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
