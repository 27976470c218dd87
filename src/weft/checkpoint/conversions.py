"""The conversions of `weft.export`: what a checkpoint becomes in another form, without a model.

Every low-rank method without m becomes LoRA, from its factors: A' = A, s' B' = s diag(b) B diag(d).
So a new method needs no edit here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .. import methods
from ..errors import CheckpointError, UnsupportedError
from ..methods import stacked
from ..methods.config import DTYPES
from ..methods.projections import Projections
from ..methods.rng import Rng
from ..ops.low_rank import LowRank
from . import formats
from .checkpoint import Checkpoint, CheckpointLayer
from .drawn import FIXED, check_drawn, digest_of, shared_checksum, shared_key

FORMS = ("lora", "peft")


def conversion(checkpoint: Checkpoint, to: str) -> Callable[[Checkpoint], Checkpoint] | None:
    """Returns the function that brings a checkpoint into the form `to`, or None if there is none.

    A checkpoint that has the form already is copied, and needs none. Raises as `params`.
    """
    config = checkpoint.config
    held = any(type(config) in each.methods for each in formats.FORMATS if each.peft_reads_it)
    if to == "peft" and held and config.mergeable and config.share_key() is not None:
        return with_projections
    if type(config) is not methods.LoRA and _is_update(checkpoint):
        return as_lora
    # The format says what it is about the checkpoint that it cannot hold.
    as_it_is = held and config.mergeable and (to == "peft" or type(config) is methods.LoRA)
    return _unchanged if as_it_is else None


def _unchanged(checkpoint: Checkpoint) -> Checkpoint:
    return checkpoint


def _is_update(checkpoint: Checkpoint) -> bool:
    """Whether W' of every layer is W + ΔW of low rank, without an m that rescales the rows of W."""
    one_of_each = {layer.rule: module for module, layer in checkpoint.sites.items()}
    return bool(one_of_each) and all(
        isinstance(rule, methods.LowRankMethod) and factors(checkpoint, module).m is None
        for rule, module in one_of_each.items()
    )


def factors(checkpoint: Checkpoint, module: str) -> LowRank:
    """Returns one layer's factors: A [r, in], B [out, r], and the vectors. Raises as `params`."""
    found: LowRank = checkpoint.sites[module].rule.factors(params(checkpoint, module))
    return found


def as_lora(checkpoint: Checkpoint) -> Checkpoint:
    """Returns the checkpoint as LoRA; every layer gets the rank and scale that it needs.

    Layers without a rank in force are left out. Raises UnsupportedError if none remains.
    """
    layers: dict[str, CheckpointLayer] = {}
    for module, layer in checkpoint.sites.items():
        A, B, scale = _plain(factors(checkpoint, module), layer.known_shape())
        if not A.shape[-2]:
            continue
        lora = methods.LoRA(
            r=A.shape[-2],
            alpha=scale * A.shape[-2],
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
        first,
        targets=list(layers),
        modules_to_save=old.modules_to_save,
        train=old.train,
        freeze_batch_norm=old.freeze_batch_norm,
        new_tokens=old.new_tokens,
    )
    return replace(checkpoint, config=config, sites=layers, projections=None, checksums={})


def _plain(f: LowRank, shape: stacked.FullShape) -> tuple[Tensor, Tensor, float]:
    """A [r, in] or [E, r, in], B [out, r] or [E, out, r], and s, for a layer of this full shape."""
    if len(shape) == 2:
        return _plain_factors(f)
    up = f.up(torch.float64) if f.d is not None or f.b is not None or f.s <= 0 else f.B
    scale = f.s if up is f.B else 1.0
    return f.A.expand(shape[0], *f.A.shape[-2:]), up.expand(shape[0], *up.shape[-2:]), scale


def _plain_factors(f: LowRank) -> tuple[Tensor, Tensor, float]:
    """A [r, in], B [out, r] and s with the diagonals in B, without ranks whose diagonal is 0."""
    A, B = f.A, f.B
    if f.b is not None:
        B = f.b.double()[:, None] * B.double()
    if f.d is not None:
        kept = f.d != 0
        A, B = A[kept], (B.double() * f.d.double())[:, kept]
    if f.s <= 0:  # LoRA's alpha must be above 0
        return A, B.double() * f.s, 1.0
    return A, B, f.s


def with_projections(checkpoint: Checkpoint) -> Checkpoint:
    """Returns the checkpoint with A [r, in] and B [out, r] of its first share key."""
    shared = params(checkpoint, next(iter(checkpoint.sites))).shared
    return replace(checkpoint, projections=(shared.A, shared.B))


def params(checkpoint: Checkpoint, module: str) -> Any:
    """Returns one layer's tensors as its configuration reads them, with the frozen ones drawn
    again.

    Raises CheckpointError if those are not the ones that were saved.
    """
    layer = checkpoint.sites[module]
    tensors: dict[str, Any] = dict(layer.tensors)
    _check_start(layer)
    tensors |= _fixed(layer, module)
    if layer.rule.share_key() is not None:
        tensors["shared"] = _shared_tensors(checkpoint, layer.rule)
    shape, cpu = layer.known_shape()[-2:], torch.device("cpu")
    tensors |= layer.rule.buffers(*shape, cpu)
    found = SimpleNamespace(shape=shape, training=False, method=layer.rule, **tensors)
    if layer.reached is not None:
        layer.rule.load_extra_state(found, layer.reached)
    return found


def _check_start(layer: CheckpointLayer) -> None:
    if layer.rule.start_shapes(1, 1).keys() - layer.tensors.keys():
        raise UnsupportedError(
            f"init={layer.rule.init!r} starts at a part of the base's weights, which this file of peft "
            "does not have. Load it with weft.load onto its base and save it; that file can be exported."
        )


def check_fixed(checkpoint: Checkpoint) -> None:
    """Raises CheckpointError if the frozen tensors of the layers are not those that were saved, and
    UnsupportedError if the file lacks those that training began at.
    """
    for layer in checkpoint.sites.values():
        _check_start(layer)
    if checkpoint.writer != "weft":  # peft has no method with frozen tensors of each layer
        return
    drawn = (
        t for module, layer in checkpoint.sites.items() for t in _fixed(layer, module).values()
    )
    known = checkpoint.checksums.get(FIXED)
    if known != (found := digest_of(drawn)):
        raise CheckpointError(
            f"the frozen tensors drawn from the seed have checksum {found}, and {known} was saved; "
            "these are other tensors."
        )


def check_shared(checkpoint: Checkpoint) -> None:
    """Raises CheckpointError if the matrices that the layers share are not those that were saved,
    or do not fit the layers.
    """
    if checkpoint.writer != "weft":  # such files have no checksum, and may not say the widths
        return
    for rule in {layer.rule for layer in checkpoint.sites.values()}:
        if rule.share_key() is not None:
            _shared_tensors(checkpoint, rule)


def _fixed(layer: CheckpointLayer, module: str) -> dict[str, Tensor]:
    if not isinstance(layer.rule, methods.LayerConfig):
        return {}
    shape = layer.known_shape()
    check_drawn(layer.rule, shape[-2], shape[-1], math.prod(shape[:-2]))
    rng = Rng(layer.rule.seed, module, torch.device("cpu"))
    drawn = stacked.frozen(layer.rule, shape, layer.kind == "embedding", rng)
    return {name: t.to(DTYPES[layer.rule.dtype]) for name, t in drawn.items()}


def _shared_tensors(checkpoint: Checkpoint, config: Any) -> Any:
    shapes = [
        (layer.known_shape()[-2], layer.known_shape()[-1])
        for layer in checkpoint.sites.values()
        if layer.rule.share_key() == config.share_key()
    ]
    if checkpoint.projections is not None:
        A, B = checkpoint.projections
        return Projections(config.r, A.shape[1], B.shape[0], config.seed, "stored", stored=(A, B))
    check_drawn(config, max(out for out, _ in shapes), max(in_ for _, in_ in shapes))
    shared = config.shared(shapes, torch.device("cpu"))
    known = checkpoint.checksums.get(shared_key(config))
    if known != shared_checksum(shared) and checkpoint.writer == "weft":
        raise CheckpointError(
            f"A and B drawn from seed {config.seed} are not those that were saved (checksum {known})."
        )
    return shared
