"""nn.Linear and its subclasses that compute the same."""

from __future__ import annotations

import torch
from torch import nn

from .base import BaseLayer, weight_fault
from .probe import affine_probe, other_map


class LinearLayer(BaseLayer):
    """y = W x + bias, W stored as [out, in]."""

    kind = "linear"

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear)

    @classmethod
    def plain(cls) -> type[nn.Module]:
        return nn.Linear

    @classmethod
    def why_not(cls, module: nn.Module) -> str | None:
        fault = weight_fault(module)
        if fault is not None:
            return fault
        if isinstance(module, torch.nn.modules.linear.NonDynamicallyQuantizableLinear):
            return "MultiheadAttention reads its weight and never calls it, so an adapter would do nothing"
        layer = cls(module)
        own = layer.fallback_reason is not None or "forward" in module.__dict__
        if not own or layer.weight().is_meta:
            return None
        return other_map(layer, *affine_probe(layer))
