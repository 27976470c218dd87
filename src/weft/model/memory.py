"""The memory that training an adapter takes, counted from shapes alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from .adapter import Adapter
from .packings import parts
from .statistics import modes_kept

ADAM_MOMENTS = 2


@dataclass(frozen=True)
class Memory:
    """Bytes. `activations` is what autograd saves for backward in one step, or None if no batch was
    given.
    """

    base: int
    trained: int
    gradients: int
    optimiser: int
    activations: int | None = None

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return self.base + self.trained + self.gradients + self.optimiser + (self.activations or 0)


def estimate(adapter: Adapter, inputs: Mapping[str, Tensor] | None = None) -> Memory:
    """Returns the memory of a training step with AdamW: exact for tensors, without the allocator's
    rounding and temporaries.

    `inputs` is a batch, for example input_ids [batch, tokens], on the model's device, which may be
    meta. If it is given, one forward measures the activations.
    """
    trained = list(adapter.parameters())
    ours = {id(p) for layer in adapter.every_layer().values() for p in layer.parameters()}
    live = {id(p): p for p in adapter.model.parameters() if id(p) not in ours}
    originals = {id(s.original): s.original for s in adapter.selected_tensors.values()}
    copies = {id(s.trained) for s in adapter.selected_tensors.values()}
    base = sum(_size(p) for key, p in {**live, **originals}.items() if key not in copies)
    shared = {id(b): b for layer in adapter.every_layer().values() for b in layer.buffers()}
    own = sum(_size(p) for p in trained)
    trained_and_shared = own + sum(_size(b) for b in shared.values())
    activations = None if inputs is None else _saved(adapter.model, inputs)
    return Memory(base, trained_and_shared, own, ADAM_MOMENTS * own, activations)


def _saved(model: nn.Module, inputs: Mapping[str, Tensor]) -> int:
    """Bytes of the distinct storages that autograd saves in one forward, without parameters and
    buffers.
    """
    known = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Any] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage  # holding it keeps its address from being used again
        return t

    with modes_kept(model):
        model.train()
        with torch.enable_grad(), saved_tensors_hooks(pack, lambda t: t):
            out = model(**inputs)
        del out
    return sum(storage.nbytes() for storage in kept.values())


def _size(t: Tensor) -> int:
    return sum(p.numel() * p.element_size() for p in parts(t))
