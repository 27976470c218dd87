"""The memory that training an adapter takes, counted from shapes alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from .adapter import Adapter
from .packings import packing_of, parts
from .statistics import modes_kept
from .structure import base_modules

ADAM_MOMENTS = 2


@dataclass(frozen=True)
class Memory:
    """Bytes. `activations` is what autograd saves for backward in one step, or None if no batch was
    given. `codes` and `scales` are the parts of `base` in packed layers, and `unpacked` is the
    largest of these layers while its weight is unpacked; the next one's takes its place.
    """

    base: int
    trained: int
    gradients: int
    optimiser: int
    activations: int | None = None
    codes: int = 0
    scales: int = 0
    unpacked: int = 0

    @property
    def total(self) -> int:
        """The sum of all parts."""
        own = self.base + self.trained + self.gradients + self.optimiser
        return own + self.unpacked + (self.activations or 0)


@dataclass(frozen=True)
class PackedSize:
    """Bytes of one packed weight: its codes, its scales, and all of it unpacked."""

    codes: int
    scales: int
    unpacked: int


def estimate(
    adapter: Adapter,
    inputs: Mapping[str, Tensor] | None = None,
    packed: Mapping[str, PackedSize] | None = None,
) -> Memory:
    """Returns the memory of a training step with AdamW: exact for tensors, without the allocator's
    rounding and temporaries.

    `inputs` is a batch, for example input_ids [batch, tokens], on the model's device, which may be
    meta. If it is given, one forward measures the activations. `packed`: layers that will be packed
    and are not, by name. Those that are packed are counted as they are.
    """
    sizes = dict(packed or {})
    modules = dict(base_modules(adapter.model))
    sizes |= {n: packed_size(m) for n, m in modules.items() if packing_of(m) is not None}
    weights = {id(p) for n in sizes for k, p in modules[n]._parameters.items() if k != "bias"}
    trained = list(adapter.parameters())
    ours = {id(p) for layer in adapter.every_layer().values() for p in layer.parameters()}
    live = {id(p): p for p in adapter.model.parameters() if id(p) not in ours}
    originals = {id(s.original): s.original for s in adapter.selected_tensors.values()}
    copies = {id(s.trained) for s in adapter.selected_tensors.values()}
    without = copies | weights
    base = sum(_size(p) for key, p in {**live, **originals}.items() if key not in without)
    codes, scales = sum(s.codes for s in sizes.values()), sum(s.scales for s in sizes.values())
    unpacked = max((s.unpacked for s in sizes.values()), default=0)
    shared = {id(b): b for layer in adapter.every_layer().values() for b in layer.buffers()}
    own = sum(_size(p) for p in trained)
    trained_and_shared = own + sum(_size(b) for b in shared.values())
    activations = None if inputs is None else _saved(adapter.model, inputs)
    return Memory(
        base + codes + scales,
        trained_and_shared,
        own,
        ADAM_MOMENTS * own,
        activations,
        codes,
        scales,
        unpacked,
    )


def packed_size(module: nn.Module) -> PackedSize:
    """Returns the bytes of a packed layer's weight, without unpacking it."""
    packing: Any = packing_of(module)
    if packing.fault(module) is not None:  # Weft cannot read it; what it holds it holds
        held = (*module._parameters.items(), *module._buffers.items())
        return PackedSize(sum(_size(t) for n, t in held if t is not None and n != "bias"), 0, 0)
    codes, *scales = (part for t in packing.tensors(module) for part in parts(t))
    out, in_ = packing.shape(module)
    return PackedSize(
        _size(codes), sum(_size(t) for t in scales), out * in_ * packing.dtype(module).itemsize
    )


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
