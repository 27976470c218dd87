"""transformers' Conv1D (GPT-2): a linear layer whose weight is stored as [in, out]."""

from __future__ import annotations

import sys

from torch import nn

from .base import BaseLayer, weight_fault
from .probe import affine_probe, other_map


class Conv1DLayer(BaseLayer):
    """y = W x + bias, W stored as [in, out]."""

    kind = "conv1d"
    transposed = True

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        plain = cls.plain()
        return plain is not None and isinstance(module, plain)

    @classmethod
    def plain(cls) -> type[nn.Module] | None:
        # Without importing transformers: if nobody has imported it, no module can be one.
        library = sys.modules.get("transformers.pytorch_utils")
        found: type[nn.Module] | None = getattr(library, "Conv1D", None)
        return found

    @classmethod
    def why_not(cls, module: nn.Module) -> str | None:
        fault = weight_fault(module)
        if fault is not None:
            return fault
        layer = cls(module)
        own = layer.fallback_reason is not None or "forward" in module.__dict__
        if not own or layer.weight().is_meta:
            return None
        return other_map(layer, *affine_probe(layer))
