"""LoftQ's start over a quantised base: A and B begin at what quantisation took from the weight.

    B A = the best approximation of (W - Q) / s of rank r,   Q the unpacked weight, W the one before

So the model at step 0 is nearer to the one that was not quantised, and not the quantised one.
DoRA's m starts at ‖Q + s B A‖, which makes W' = Q + s B A. Q stays as it is, so this is the first
of the paper's alternating steps; the later ones would quantise W - s B A anew. Source:
arXiv:2310.08659, section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..errors import CheckpointError, UnsupportedError, WeftError
from ..methods import DoRA, LoRA
from ..methods.starts import of_weight
from ..model.state import state_of
from ..model.structure import canonical
from ..ops.norm import full_precision, row_norm

_OTHER = 0.5  # of the size of a weight: 4 bits take 0.1 of it, and other weights are 1.4 away
Weights = Mapping[str, Tensor] | str | Path


@dataclass(frozen=True)
class LoftQReport:
    """`before` and `after`: ‖W - Q‖ and ‖W - Q - s B A‖ over ‖W‖, over all quantised layers."""

    layers: int
    before: float
    after: float

    def __str__(self) -> str:
        return (
            f"LoftQ's start on {self.layers} layers: the distance from the weights before "
            f"quantisation is {self.after:.1%} of their size, and was {self.before:.1%}."
        )


@torch.no_grad()
def loftq(model: nn.Module, weights: Weights, name: str = "default") -> LoftQReport:
    """Starts the LoRA or DoRA `name` on a quantised base as LoftQ does, before its first step.

    `weights`: those before quantisation, as tensors [out, in] by name ("...q_proj.weight"), a file
    model.safetensors, or a folder with such files. Layers that are not quantised keep their start.

    Raises UnsupportedError (another method, or no layer is quantised), WeftError (the adapter has
    been trained), CheckpointError (a weight is missing or has another shape). Nothing has changed
    then.
    """
    adapter = state_of(model).adapter(name)
    packed = _packed_layers(adapter)
    read = _reader(weights, getattr(adapter.model, "base_model_prefix", ""))
    labels = {layer.base.packing.label(layer.base.module) for layer in packed.values()}
    if len(labels) > 1:
        raise UnsupportedError(f"the layers are packed in several ways, {sorted(labels)}; use one.")
    starts, lost, left, whole = {}, 0.0, 0.0, 0.0
    for module, layer in packed.items():
        Q = layer.base.weight().float()
        W = _turned(read(canonical(module)).to(Q.device).float(), Q)
        if W.shape != Q.shape or (W - Q).norm() > _OTHER * Q.norm():
            raise CheckpointError(
                f"the weights have {module + '.weight'!r} with other numbers {list(W.shape)} than the "
                f"model's {list(Q.shape)}. Give those of the same model before it was quantised."
            )
        R, s = W - Q, layer.method.scale
        with full_precision(Q.device):
            start = _start(R, layer.method.r, s, module)
            update = s * start["B"] @ start["A"]
            if isinstance(layer.method, DoRA):
                start["m"] = row_norm(Q + update)
        lost, left = lost + float(R.square().sum()), left + float((R - update).square().sum())
        whole += float(W.square().sum())
        starts[module] = start
    adapter.loftq = labels.pop()
    for module, start in starts.items():
        for tensor, value in start.items():
            packed[module].get_parameter(tensor).copy_(value)
    return LoftQReport(len(packed), (lost / whole) ** 0.5, (left / whole) ** 0.5)


def _packed_layers(adapter: Any) -> dict[str, Any]:
    """The adapter's quantised layers. Raises UnsupportedError, WeftError."""
    if not isinstance(adapter.config, LoRA):
        raise UnsupportedError(
            f"LoftQ starts A and B of LoRA and DoRA, and {type(adapter.config).__name__} has others."
        )
    found = {n: layer for n, layer in adapter.layers.items() if layer.base.codes() is not None}
    if not found:
        raise UnsupportedError(
            f"adapter {adapter.name!r} has no quantised layer, so there is nothing for LoftQ to make "
            "good. Load the base quantised (docs/bases.md), or attach with another init."
        )
    for module, layer in found.items():
        if layer.method.starts_at_weight:
            raise UnsupportedError(
                f"{module!r} starts with init={layer.method.init!r}, whose A and B have another meaning. "
                'Attach with init="gaussian" or "kaiming".'
            )
        if bool(layer.get_parameter("B").any()):
            raise WeftError(
                f"B of {module!r} is not 0: adapter {adapter.name!r} has been trained or loaded, and "
                "LoftQ would overwrite it. Call weft.loftq right after weft.attach."
            )
    return found


def _start(R: Tensor, r: int, s: float, layer: str) -> dict[str, Tensor]:
    """A [r, in] and B [out, r] with s B A nearest to R [out, in]; rows beyond R's own are 0."""
    A, B = R.new_zeros(r, R.shape[1]), R.new_zeros(R.shape[0], r)
    k = min(r, *R.shape)
    A[:k], B[:, :k] = of_weight("pissa", R, k, s, layer)
    return {"A": A, "B": B}


def _turned(W: Tensor, Q: Tensor) -> Tensor:
    """W [out, in], which GPT-2's layers store the other way round: as it is nearer to Q [out, in]."""
    turned = W.t()
    if turned.shape != Q.shape:
        return W
    return turned if W.shape != Q.shape or (turned - Q).norm() < (W - Q).norm() else W


def _reader(weights: Weights, prefix: str) -> Callable[[str], Tensor]:
    """A function that returns the weight of a module by its name in the model, whose body is called
    `prefix`: files of a body alone do not say it. Raises CheckpointError if there is none.
    """
    if isinstance(weights, Mapping):
        read, known, where = weights.__getitem__, set(weights), "the weights"
    else:
        read, known = _files(Path(weights).expanduser())
        where = repr(str(weights))

    def weight(module: str) -> Tensor:
        """Returns a weight [...] of the files by its name."""
        name = f"{module}.weight"
        for each in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"):
            if each in known:
                return read(each)
        raise CheckpointError(
            f"{where} has no tensor {name!r}. Give the weights of the same model before it was "
            "quantised."
        )

    return weight


def _files(path: Path) -> tuple[Callable[[str], Tensor], set[str]]:
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise CheckpointError(
            f"{str(path)!r} has no .safetensors file. Give the folder of the model before it was "
            "quantised."
        )
    where = {name: file for file in files for name in _tensor_names(file)}

    def read(name: str) -> Tensor:
        """Returns a tensor [...] of the files."""
        with safe_open(str(where[name]), framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
            return tensor

    return read, set(where)


def _tensor_names(file: Path) -> list[str]:
    try:
        with safe_open(str(file), framework="pt") as opened:
            return list(opened.keys())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{str(file)!r} cannot be read: {error}") from None
