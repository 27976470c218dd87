"""Any low-rank method on a stack of weights [E, out, in], as fused experts are: every weight of the
stack is adapted by itself, and each tensor of the method gets the dimension E in front.

A method knows nothing of it. Its shapes and its tensors at the start are those of each weight,
stacked; its factors, computed from stacked tensors, are those of all weights at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .base import LowRankMethod, Shape, Shared
from .rng import Rng

FullShape = tuple[int, ...]  # (out, in), or (E, out, in) of a stack


def why_not(method: Any) -> str | None:
    """Returns why a method cannot adapt a stack of weights, or None."""
    name = type(method).__name__
    if not isinstance(method, LowRankMethod):
        return f"{name} is no low-rank change of a weight"
    if method.follows_steps or method.moves_rank or method.nested:  # type: ignore[attr-defined]
        return f"{name} acts on the ranks of each weight, or between optimiser steps"
    return None


def shapes(method: Any, shape: FullShape) -> dict[str, Shape]:
    """Returns name and shape of every trained tensor of a layer, in the file's order."""
    return _stacked(method.shapes(*shape[-2:]), shape)


def file_shapes(method: Any, shape: FullShape) -> dict[str, Shape]:
    """Returns name and shape of every tensor of a layer that a file has."""
    return _stacked(method.file_shapes(*shape[-2:]), shape)


def initial(method: Any, layer: Any, rng: Rng, shared: Shared | None) -> dict[str, Tensor]:
    """Returns the tensors [...] at the start of training, with the shapes of `file_shapes`."""
    if layer.stack is None:
        found: dict[str, Tensor] = method.initial(layer, rng, shared)
        return found
    weights = [layer.of_weight(i) for i in range(layer.stack)]
    return _together(
        [method.initial(weight, _own(rng, i), shared) for i, weight in enumerate(weights)]
    )


def frozen(method: Any, shape: FullShape, takes_ids: bool, rng: Rng) -> dict[str, Tensor]:
    """Returns the frozen tensors [...] of a layer, which no file contains."""
    size = shape[-2:]
    if len(shape) == 2:
        found: dict[str, Tensor] = method.frozen(*size, takes_ids, rng)
        return found
    return _together([method.frozen(*size, takes_ids, _own(rng, i)) for i in range(shape[0])])


def known(shape: FullShape, stack: int | None) -> FullShape:
    """Returns the full shape of a layer [out, in] with this many weights, or one."""
    return shape if stack is None else (stack, *shape)


def _own(rng: Rng, i: int) -> Rng:
    return Rng(rng.seed, f"{rng.name}.{i}", rng.device)


def _stacked(found: dict[str, Shape], shape: FullShape) -> dict[str, Shape]:
    return {name: (*shape[:-2], *own) for name, own in found.items()}


def _together(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
