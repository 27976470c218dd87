"""Whether a layer of a file can be a layer of a model: its kind, its width, and what its kernel means."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from ..methods import stacked
from ..model.base_layers.experts import EXCHANGED, KIND
from ..model.structure import Structure
from . import formats
from .checkpoint import Checkpoint, CheckpointLayer


def misfit(module: str, name: str, layer: CheckpointLayer, host: Any) -> str | None:
    """Returns why the file's `module` is another layer than the model's `name`, of which `host` is the
    view, or None.
    """
    kernel = getattr(host, "geometry", None)
    shape = stacked.known((host.out_features, host.in_features), host.stack)
    family = _family(layer.kind)
    if layer.kind is None and kernel is not None:  # peft's AdaLoRA has matrices either way
        fault = formats.convolution_fault(kernel, (2,))
        family = "convolution" if fault is None else family
    if family != _family(host.kind) or (layer.shape or shape) != shape:
        return (
            f"{module!r} is a {layer.kind or 'linear'} layer {list(layer.shape or shape)} (out, in) in the "
            f"file, and the model's {name!r} a {host.kind} layer {list(shape)}"
        )
    if layer.geometry not in (None, kernel):
        return f"{module!r} is a convolution {layer.geometry} in the file, and the model's {name!r} one {kernel}"
    return None


def expected(checkpoint: Checkpoint, structure: Structure, layers: Collection[str]) -> list[str]:
    """Returns those of the layers that a configuration names in a model which the file must have.
    Files without fused experts, of peft or of an earlier version, did not mean any by a name's ending.
    """
    stacks = any(layer.kind in (KIND, EXCHANGED) for layer in checkpoint.sites.values())
    if stacks and checkpoint.writer == "weft":
        return list(layers)
    return [name for name in layers if name in structure.modules]


def _family(kind: str | None) -> str:
    """Layers of one family can take each other's tensors; a matrix may be stored transposed."""
    if kind in (KIND, EXCHANGED):
        return KIND
    return kind if kind in ("embedding", "norm", "convolution") else "linear"
