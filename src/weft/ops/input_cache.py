"""Products computed once for all layers that read the same input (q, k and v; gate and up).

`SharedDown` keeps x Aᵀ for an A that these layers share (VeRA); `gathered` keeps rows of an input
and their products in a mixed batch.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import philox
from .cache import Cache, counts

_last = threading.local()


class _Forward(threading.local):
    """The forwards of models that this thread is inside of, by number, with the frames of their
    calls; `number` is 0 outside any.
    """

    def __init__(self) -> None:
        self.begun, self.number = 0, 0
        self.open: list[tuple[int, Any]] = []


_forward = _Forward()
_vectors: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}
_task = torch._C._current_graph_task_id
_hooks = torch._C._autograd._top_saved_tensors_default_hooks


def begin_forward(call: Any) -> None:
    """Called before a forward of a model, with the frame of its call: what needs gradients is
    shared within one forward only.
    """
    forget_ended()
    _forward.begun += 1
    _forward.number = _forward.begun
    _forward.open.append((_forward.number, call))


def in_forward() -> bool:
    """Whether this thread is inside a forward that began with `begin_forward`."""
    return _forward.number > 0


def end_forward(call: Any) -> None:
    """Called after a forward of a model; does nothing if that call did not begin."""
    place = next((i for i, (_, c) in enumerate(_forward.open) if c is call), None)
    if place is not None:
        del _forward.open[place:]
        _forward.number = _forward.open[-1][0] if _forward.open else 0


def forget_ended() -> None:
    """Forgets forwards that an interrupt (KeyboardInterrupt) has ended without a sign."""
    while _forward.open and not runs(_forward.open[-1][1]):
        end_forward(_forward.open[-1][1])


def runs(call: Any) -> bool:
    """Whether the call of a frame has not ended. `sys._current_frames()` would say so too, but it
    can lock up the process (CPython issue 106883).
    """
    try:
        call.clear()  # only raises if the call runs; one that has ended no longer needs its locals
    except RuntimeError:
        return True
    return False


def mark(x: Tensor) -> Tensor:
    """Returns x v [tokens] for x [..., in] and a fixed random v [in]: another one if numbers of x
    were written to in a way that torch does not count (numpy, `.data`).
    """
    x = x.detach()
    key = (x.shape[-1], x.dtype, x.device)
    if key not in _vectors:
        made = philox.uniform(0x1A9E7, 0, 1, x.shape[-1], 1.0, x.device)[0]
        _vectors[key] = made.to(x.dtype)
    return torch.mv(x.reshape(-1, x.shape[-1]), _vectors[key])


class SharedDown:
    """x Aᵀ [..., r] for the last input x and a view A of one frozen matrix. A copy starts empty."""

    def __init__(self) -> None:
        self._cast = Cache()
        self._last: tuple[Any, tuple[Any, ...], Tensor, Tensor] | None = None

    def __reduce__(self) -> Any:
        return SharedDown, ()

    def __call__(self, x: Tensor, A: Tensor, detached: bool) -> Tensor:
        """Returns x Aᵀ [..., r] for x [..., in] and A [r, in], with or without the gradient of x.

        The product is kept until x is gone or was written to. With gradients it serves one forward
        of the model, in one checkpointed region: another forward has a backward pass of its own,
        and a recomputation must save what the first forward of its region saved.
        """
        graph = torch.is_grad_enabled()
        region = _hooks(True) if graph else None
        key = (
            None if x.is_inference() else x._version,
            A.data_ptr(),
            A._version,
            A.shape,
            A.dtype,
            detached,
            threading.get_ident(),
            _forward.number if graph else None,
            _task() if graph else None,
            None if region is None else region[0],
        )
        last, marked = self._last, None
        within = not graph or _forward.number > 0 or key[8] != -1  # a forward, or a recomputation
        may_share = key[0] is not None and within
        if may_share and last is not None and last[0]() is x and last[1] == key:
            marked = mark(x)
            if torch.equal(marked, last[2]):
                return last[3]
        counts["A x"] += 1
        source = x.detach() if detached else x
        h = torch.nn.functional.linear(source, self._in_dtype(A, x.dtype))
        if may_share:
            marked = mark(x) if marked is None else marked
            self._last = (weakref.ref(x, self._forget), key, marked, h)
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
    """Rows gathered from x [n, tokens, in] and their products, kept until x is freed or
    modified.
    """

    def __init__(self, n: int, version: int | None = None, marked: Tensor | None = None) -> None:
        self.n, self.version, self.marked = n, version, marked
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
    marked = mark(x)
    if held is not None and held[0]() is x:
        found = held[1]
        same = (found.n, found.version) == (n, x._version) and found.marked is not None
        if same and torch.equal(found.marked, marked):  # type: ignore[arg-type]
            return found
    held = weakref.ref(x, _forget), Gathered(n, x._version, marked)
    _last.held = held
    return held[1]


def _forget(gone: Any) -> None:
    held = getattr(_last, "held", None)
    if held is not None and held[0] is gone:
        _last.held = None
