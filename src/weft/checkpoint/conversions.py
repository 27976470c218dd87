"""The conversions of `weft.export`: what a checkpoint becomes in another form, without a model.

A new conversion is a function and a line in CONVERSIONS.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .. import methods
from ..errors import CheckpointError, UnsupportedError
from ..methods.config import DTYPES
from ..methods.projections import Projections
from ..methods.rng import Rng
from ..ops.low_rank import LowRank
from .checkpoint import Checkpoint, CheckpointLayer
from .drawn import FIXED, digest_of, shared_checksum, shared_key


def as_lora(checkpoint: Checkpoint) -> Checkpoint:
    """Returns the checkpoint as LoRA; every layer gets the rank and scale that it needs.

    Layers without a rank in force are left out. Raises UnsupportedError if none remains.
    """
    layers: dict[str, CheckpointLayer] = {}
    for module, layer in checkpoint.sites.items():
        A, B, scale = _plain_factors(layer.rule.factors(params(checkpoint, module)))
        if not len(A):
            continue
        lora = methods.LoRA(
            r=len(A),
            alpha=scale * len(A),
            init="kaiming",
            dropout=layer.rule.dropout,
            dtype=layer.rule.dtype,
        )
        dtype = DTYPES[layer.rule.dtype]
        tensors = {"A": A.to(dtype), "B": B.to(dtype)}
        layers[module] = replace(layer, rule=lora, tensors=tensors, reached=None)
    if not layers:
        raise UnsupportedError(
            "no triplet of any layer is in force, so there is nothing to export."
        )
    old, first = checkpoint.config, next(iter(layers.values())).rule
    config = replace(
        first, targets=list(layers), modules_to_save=old.modules_to_save, train=old.train
    )
    return replace(checkpoint, config=config, sites=layers, projections=None, checksums={})


def _plain_factors(f: LowRank) -> tuple[Tensor, Tensor, float]:
    """A [r, in], B [out, r] and s with the diagonals in B, without ranks whose diagonal is 0."""
    A, B = f.A, f.B
    if f.b is not None:
        B = f.b.double()[:, None] * B.double()
    if f.d is not None:
        kept = f.d != 0
        A, B = A[kept], (B.double() * f.d.double())[:, kept]
    return A, B, f.s


def with_projections(checkpoint: Checkpoint) -> Checkpoint:
    """Returns the checkpoint with A [r, in] and B [out, r] of its first share key."""
    shared = params(checkpoint, next(iter(checkpoint.sites))).shared
    return replace(checkpoint, projections=(shared.A, shared.B))


# By form and method. A checkpoint that has the form already is copied, and needs no line here.
CONVERSIONS: Mapping[str, Mapping[type[Any], Callable[[Checkpoint], Checkpoint]]] = {
    "lora": {
        methods.LoRAFA: as_lora,
        methods.DyLoRA: as_lora,
        methods.AdaLoRA: as_lora,
        methods.VeRA: as_lora,
    },
    "peft": {
        methods.LoRAFA: as_lora,
        methods.DyLoRA: as_lora,
        methods.AdaLoRA: as_lora,
        methods.VeRA: with_projections,
    },
}
FORMS = tuple(CONVERSIONS)


def params(checkpoint: Checkpoint, module: str) -> Any:
    """Returns one layer's tensors as its configuration reads them, with the frozen ones drawn again.

    Raises CheckpointError if those are not the ones that were saved.
    """
    layer = checkpoint.sites[module]
    tensors: dict[str, Any] = dict(layer.tensors)
    tensors |= _fixed(layer, module)
    if layer.rule.share_key() is not None:
        tensors["shared"] = _shared_matrices(checkpoint, layer.rule)
    return SimpleNamespace(shape=layer.known_shape(), training=False, **tensors)


def check_fixed(checkpoint: Checkpoint) -> None:
    """Raises CheckpointError if the frozen tensors of the layers are not those that were saved."""
    drawn = (
        t for module, layer in checkpoint.sites.items() for t in _fixed(layer, module).values()
    )
    known = checkpoint.checksums.get(FIXED)
    if known is not None and known != (found := digest_of(drawn)):
        raise CheckpointError(
            f"the frozen tensors drawn from the seed have checksum {found}, and {known} was saved; "
            "these are other tensors."
        )


def _fixed(layer: CheckpointLayer, module: str) -> dict[str, Tensor]:
    if not isinstance(layer.rule, methods.LayerConfig):
        return {}
    rng = Rng(layer.rule.seed, module, torch.device("cpu"))
    drawn = layer.rule.frozen(*layer.known_shape(), layer.kind == "embedding", rng)
    return {name: t.to(DTYPES[layer.rule.dtype]) for name, t in drawn.items()}


def _shared_matrices(checkpoint: Checkpoint, config: Any) -> Projections:
    shapes = [
        layer.known_shape()
        for layer in checkpoint.sites.values()
        if layer.rule.share_key() == config.share_key()
    ]
    max_out, max_in = max(o for o, _ in shapes), max(i for _, i in shapes)
    if checkpoint.projections is not None:
        A, B = checkpoint.projections
        return Projections(config.r, A.shape[1], B.shape[0], config.seed, "stored", stored=(A, B))
    shared = Projections(config.r, max_in, max_out, config.seed, config.draw)
    known = checkpoint.checksums.get(shared_key(config))
    if known is not None and known != shared_checksum(shared):
        raise CheckpointError(
            f"A and B drawn from seed {config.seed} are not those that were saved (checksum {known})."
        )
    return shared
