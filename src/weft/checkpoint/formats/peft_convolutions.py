"""Convolutions in peft's LoRA and DoRA, which keep kernels and no matrices:

lora_A [r, in, *size]      lora_B [out, r, 1, ...]      lora_magnitude_vector [1, out, 1, ...]

peft builds lora_A with the layer's stride and padding alone: with groups it trains another method,
whose A reads all channels (and which peft cannot merge); with a dilation, or a padding other than
by zeros, it computes another map; transposed convolutions it refuses.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from torch import Tensor

from ...ops.convolution import Geometry
from ..checkpoint import Checkpoint, CheckpointLayer


def why_not(checkpoint: Checkpoint, dims: tuple[int, ...] = (1, 2, 3)) -> str | None:
    """Returns why peft cannot hold a convolution of the checkpoint, or None. `dims`: the numbers of
    dimensions that it knows.
    """
    for name, layer in checkpoint.sites.items():
        if layer.kind == "convolution":
            fault = fault_of(layer.geometry, dims)
            if fault is not None:
                return f"peft cannot hold the convolution {name!r}: it has {fault}"
    return None


def fault_of(geometry: Geometry | None, dims: tuple[int, ...] = (1, 2, 3)) -> str | None:
    """Returns what of a convolution peft does not carry over to its A, or None."""
    if geometry is None:
        return "settings that the file does not record"
    if geometry.transposed:
        return "a transposed kernel"
    if geometry.groups > 1:
        return f"{geometry.groups} groups"
    if max(geometry.dilation, default=1) > 1 and dims != (2,):  # its AdaLoRA builds the weight
        return f"a dilation of {geometry.dilation}"
    if geometry.padding_mode != "zeros":
        return f"padding by {geometry.padding_mode!r}"
    if len(geometry.size) not in dims:
        return f"{len(geometry.size)} dimensions"
    return None


def in_file(layer: CheckpointLayer, tensor: str, t: Tensor) -> Tensor:
    """Returns a tensor of a layer in the shape that peft gives it; of a convolution A [r, in · k]
    becomes [r, in, *size], B [out, r] gets places [1, ...], and m [out] is [1, out, 1, ...].
    """
    if layer.geometry is None:
        return t
    ones = (1,) * len(layer.geometry.size)
    if tensor == "m":
        return t.reshape(1, -1, *ones)
    return t.reshape(
        len(t), *((layer.geometry.inputs, *layer.geometry.size) if tensor == "A" else (-1, *ones))
    )


def flattened(
    tensors: dict[str, Tensor], parts: Mapping[str, tuple[str, str]]
) -> dict[str, Geometry]:
    """Replaces the kernels among the tensors of layers by matrices, and returns what they mean, by
    module. `parts`: (module, A, B or m) by key.

    Tensors of other shapes are left as they are, and then fit no layer.
    """
    keys: dict[str, dict[str, str]] = defaultdict(dict)
    for key, (module, part) in parts.items():
        keys[module][part] = key
    found = {}
    for module, own in keys.items():
        A = tensors[own["A"]] if "A" in own else None
        if A is None or not 3 <= A.ndim <= 5 or not A.numel():
            continue
        ones = (1,) * (A.ndim - 2)
        shapes = {part: tuple(tensors[key].shape) for part, key in own.items()}
        rest = {"B": shapes.get("B", ones)[2:], "m": shapes.get("m", (1, 1, *ones))[2:]}
        if rest["B"] != ones or rest["m"] != ones or shapes.get("m", (1,))[0] != 1:
            continue
        found[module] = Geometry(A.shape[1], tuple(A.shape[2:]), 1, ones, "zeros", False)
        for part, key in own.items():
            tensors[key] = tensors[key].flatten(0 if part == "m" else 1)
    return found
