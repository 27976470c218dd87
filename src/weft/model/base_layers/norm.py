"""Layer norms and RMS norms: no linear map; for methods that compute something beside a layer."""

from __future__ import annotations

from torch import nn

from .base import BaseLayer


class NormLayer(BaseLayer):
    """A norm with a gain [out], of torch or of a model's own."""

    kind = "norm"
    has_weight = False

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return is_norm(module)

    @classmethod
    def why_not(cls, module: nn.Module) -> str | None:
        return None


def is_norm(module: nn.Module, width: int | None = None) -> bool:
    """Whether a module is a layer norm or RMS norm with a gain, of this width if one is given."""
    name, weight = type(module).__name__.lower(), module._parameters.get("weight")
    if "norm" not in name or any(other in name for other in ("batch", "group", "instance")):
        return False
    return weight is not None and weight.ndim == 1 and width in (None, weight.shape[0])
