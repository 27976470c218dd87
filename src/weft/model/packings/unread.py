"""Packed layers that Weft knows by sight and cannot read: GPTQ, AWQ and others whose codes are
buffers, compressed-tensors, whose forward on the instance calls that of the class, and layers that
round their inputs, too (float8 of transformers, torch.ao): there is no W whose product they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...methods.config import DTYPES
from .base import Packing, own_class, own_name

_CODES = ("qweight", "weight_packed", "Wqweight")
_PLAIN = (*DTYPES.values(), torch.bool, torch.complex64, torch.complex128)
# The configuration of transformers that gives floats when the model loads, by package or class.
_FLOATS = {
    "compressed-tensors": "CompressedTensorsConfig(dequantize=True)",
    "CompressedTensorsFP8Linear": "CompressedTensorsConfig(dequantize=True)",
    "FP8Linear": "FineGrainedFP8Config(dequantize=True)",
    "MetalLinear": "MetalConfig(dequantize=True)",
}


class Unread(Packing):
    """A layer whose codes nothing here unpacks; the plan lists it, and targets refuse it by name."""

    package = "another library"

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        names = (*module._parameters, *module._buffers)
        if any(name in names for name in _CODES) or hasattr(module, "quantization_scheme"):
            return True
        return _has_codes(module) or own_class(module).__module__.startswith(
            "torch.ao.nn.quantized"
        )

    @classmethod
    def fault(cls, module: Any) -> str | None:
        source, name = own_name(module)
        if hasattr(module, "quantization_scheme"):
            source = "compressed-tensors"
        how = _FLOATS.get(source, _FLOATS.get(name))
        cure = "without quantisation" if how is None else f"in floats, with {how}"
        return (
            f"its weight is packed by {source} ({name}), which Weft cannot unpack; load the model "
            f"{cure}, or with bitsandbytes, torchao, quanto or hqq"
        )

    @classmethod
    def shape(cls, module: Any) -> tuple[int, int]:
        found = [
            next((int(v) for n in names if isinstance(v := getattr(module, n, None), int)), 0)
            for names in (("out_features", "outfeatures"), ("in_features", "infeatures"))
        ]
        return found[0], found[1]


def _has_codes(module: Any) -> bool:
    """Whether a layer of a class of its own has widths, whole numbers or float8 for a weight, and other
    tensors beside it (scales): a weight that is only stored so is of an unsupported dtype.
    """
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    if not all(isinstance(size, int) for size in sizes):
        return False
    if own_class(module).forward is nn.Linear.forward:
        return False
    named = {**module._parameters, **module._buffers}
    tensors = [t for t in named.values() if t is not None]
    if not any(t is not None for n, t in named.items() if n not in ("weight", "bias")):
        return False
    if any(t.ndim == 2 and t.dtype in DTYPES.values() and min(t.shape) > 1 for t in tensors):
        return False
    return any(t.ndim > 0 and t.numel() > 1 and t.dtype not in _PLAIN for t in tensors)
