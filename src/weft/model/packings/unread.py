"""Packed layers that Weft knows by sight and cannot read: GPTQ, AWQ and others whose codes are buffers,
and compressed-tensors, whose forward on the instance calls that of the class.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .base import Packing, own_name

_CODES = ("qweight", "weight_packed", "Wqweight")


class Unread(Packing):
    """A layer whose codes nothing here unpacks; the plan lists it, and targets refuse it by name."""

    package = "another library"

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        names = (*module._parameters, *module._buffers)
        return any(name in names for name in _CODES) or hasattr(module, "quantization_scheme")

    @classmethod
    def fault(cls, module: Any) -> str | None:
        source, name = own_name(module)
        if hasattr(module, "quantization_scheme"):
            source = "compressed-tensors"
        return (
            f"its weight is packed by {source} ({name}), which Weft cannot unpack; load the model "
            "without quantisation, or with bitsandbytes, torchao, quanto or hqq"
        )

    @classmethod
    def shape(cls, module: Any) -> tuple[int, int]:
        found = [
            next((int(v) for n in names if isinstance(v := getattr(module, n, None), int)), 0)
            for names in (("out_features", "outfeatures"), ("in_features", "infeatures"))
        ]
        return found[0], found[1]
