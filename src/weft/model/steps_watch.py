"""Detects tensors that move although no optimiser step was seen, for methods that act around steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedError


class Watch:
    """Detects that the tensors of one layer move twice, each time after a backward pass, although
    no optimiser step was followed.

    Tensors may also change without a gradient: by hand, by loading, or by averaging. They may
    change once after a gradient, since SAM computes a second gradient at another point before its
    step. A copy starts anew.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.forget()

    def forget(self) -> None:
        """Makes the next forward the one that later forwards are compared with."""
        self._known: list[Tensor] = []
        self._reached = False
        self._moves = 0

    def look(self, layer: Any, out: Tensor) -> None:
        """Compares the tensors of a layer with those of the last forward; `out` [..., out] is its
        output.

        Every forward in training calls it. Raises UnsupportedError at the second move without a
        step.
        """
        if not out.requires_grad:
            return
        now = [
            getattr(layer, name).detach() for name in layer.names
        ]  # FSDP leaves no parameters in the layer
        if self._reached and not _alike(now, self._known):
            self._moves, self._reached = self._moves + 1, False
            if self._moves > 1:
                raise UnsupportedError(unseen(self.name, layer.method))
        if not self._reached:
            self._known = [t.clone() for t in now]
        out.register_hook(self._reach)  # type: ignore[no-untyped-call]

    def _reach(self, gradient: Tensor) -> None:
        self._reached = True

    def __reduce__(self) -> Any:
        return Watch, (self.name,)


def _alike(now: list[Tensor], known: list[Tensor]) -> bool:
    """Returns True if the tensors are equal, or replaced by others of another shape, dtype or
    device.
    """
    return all(
        torch.equal(a, b)
        for a, b in zip(now, known, strict=True)
        if (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
    )


def unseen(name: str, config: Any) -> str:
    """Returns the error message for tensors that moved without a step of an optimiser that has
    them.
    """
    method = type(config).__name__
    return (
        f"the tensors of adapter {name!r} have moved, and no optimiser that holds them has taken a "
        f"step: {method} acts "
        "at every step, and has not. An optimiser with flat shards or copies of the tensors (FSDP, "
        "DeepSpeed, master "
        "weights) or a step by hand does that. Give adapter.parameters() to a torch.optim "
        "optimiser "
        "(ZeroRedundancyOptimizer may wrap it), or take a method that follows no steps, such as "
        "LoRA."
    )
