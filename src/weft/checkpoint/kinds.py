"""Whether a layer of a file can be a layer of a model: its kind, its width, and what its kernel
means.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from ..methods import stacked
from ..methods.target_spec import KEYWORDS
from ..model.base_layers.experts import EXCHANGED, KIND
from ..model.base_layers.held import KIND as HELD
from ..model.structure import Structure
from ..model.structure.targets import is_stack
from . import formats
from .checkpoint import Checkpoint, CheckpointLayer


def misfit(module: str, name: str, layer: CheckpointLayer, host: Any) -> str | None:
    """Returns why the file's `module` is another layer than the model's `name`, of which `host` is
    the view, or None.
    """
    if host.kind == HELD and layer.kind != HELD:
        return (
            f"{module!r}: the model's {name!r} is a weight that its module reads itself, and in the file it "
            "is a layer that is called (peft trains such a layer without effect)"
        )
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
    Files without fused experts, of peft or of an earlier version, did not mean any by a name's
    ending, nor by a keyword a weight of attention.
    """
    kinds = {layer.kind for layer in checkpoint.sites.values()}
    if not kinds & {KIND, EXCHANGED} or checkpoint.writer != "weft":
        layers = [name for name in layers if not is_stack(structure, name)]
    if HELD not in kinds and getattr(checkpoint.config, "targets", None) in KEYWORDS:
        layers = [name for name in layers if name not in structure.held]
    return list(layers)


def _family(kind: str | None) -> str:
    """Layers of one family can take each other's tensors; a matrix may be stored transposed."""
    if kind in (KIND, EXCHANGED):
        return KIND
    return kind if kind in ("embedding", "norm", "convolution") else "linear"
