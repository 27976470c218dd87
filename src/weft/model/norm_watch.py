"""Notices that trained tensors have changed without a sign of it, where no call can compare
numbers.

On a GPU every comparison waits for the device, so there a kept norm is only checked by versions and
optimiser steps (ops/cache.py). Copying averaged weights through `.data`, or a step by hand, changes
neither. So once per forward of the model a few sums over all tensors that norms depend on are compared
with those of the forward before: one wait, and none in the forward after an optimiser step.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..ops import cache


class NormWatch:
    """The sums of one model's forward before, per adapter. A copy starts empty."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[int, Tensor]] = {}  # the optimiser step and the sums

    def __reduce__(self) -> Any:
        return NormWatch, ()

    def check(self, adapters: Iterable[Any]) -> None:
        """Drops the kept norms of these adapters' layers if their tensors are others than in the
        forward before and no optimiser has stepped since.
        """
        if not cache.kept_on:
            return
        for adapter in adapters:
            layers = [
                layer
                for layer in adapter.layers.values()
                if len(layer.cache) and layer.base.device.type not in cache.compared
            ]
            if layers:
                self._check(adapter.name, layers)

    def _check(self, name: str, layers: list[Any]) -> None:
        tensors = [p.detach() for layer in layers for p in layer.trainable().values()]
        sums, step = _sums(tensors), cache.steps_so_far()
        last_step, last = self._last.get(name, (-1, torch.empty(0)))
        known = step == last_step and sums.shape == last.shape
        if known and not torch.equal(sums, last):
            for layer in layers:
                layer.cache.clear()
        self._last[name] = step, sums


@torch.no_grad()
def _sums(tensors: list[Tensor]) -> Tensor:
    """‖t‖ and ‖t + 1‖ of every tensor [...], which no change of sign or scale leaves as they are."""
    norms = [*torch._foreach_norm(tensors), *torch._foreach_norm(torch._foreach_add(tensors, 1.0))]
    return torch.stack([n.float() for n in norms])
