"""Linear layers whose weight is stored in few bits (model/packings/): 4 and 8 bits, bytes, float8.

The layer computes its own output as it is. W is unpacked only to be read: once per optimiser step
for DoRA's norm, once in all for DVoRA's, and never for a method without a magnitude.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...ops.cache import counts
from ..packings import SHADOW, Packing, packing_of
from .base import BaseLayer, own_class, own_forward

_GRADIENT = 1e-2  # the largest relative distance of the input's gradient from gᵀ W
_OUTPUT = 5e-2  # the same for the output: bfloat16's rounding of a sum, LLM.int8()'s of the input
_faults: dict[tuple[type[nn.Module], str], str | None] = {}  # what was tried, per kind of layer


class PackedLayer(BaseLayer):
    """y = W x + bias, W stored as its library likes."""

    kind = "linear"

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        packing = packing_of(module)
        if packing is None:
            raise TypeError(f"the weight of this {type(module).__name__} is not packed")
        self.packing: type[Packing] = packing
        packing.prepare(module)

    @property
    def packed(self) -> nn.Module:
        """The layer with its codes: the module, or what it was before an adapter was merged into
        it.
        """
        found: nn.Module = self.module.__dict__.get(SHADOW, self.module)
        return found

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return packing_of(module) is not None

    @classmethod
    def why_not(cls, module: nn.Module) -> str | None:
        packing = packing_of(module)
        if packing is None:
            return "its weight is not packed"
        fault = packing.fault(module)
        if fault is not None:
            return fault
        layer = cls(module)
        how = (packing.label(module), packing.details(module), str(module.training))
        key = own_class(module), ", ".join(how)
        if key not in _faults:
            _faults[key] = _other_map(layer)
        return _faults[key]

    def weight(self) -> Tensor:
        """Returns W [out, in], unpacked into new memory."""
        counts["unpacked"] += 1
        with torch.no_grad():
            return self.packing.weight(self.packed)

    def codes(self) -> tuple[Tensor, ...]:
        """Returns the tensors [...] that hold W."""
        return self.packing.tensors(self.packed)

    @property
    def out_features(self) -> int:
        return self.packing.shape(self.packed)[0]

    @property
    def in_features(self) -> int:
        return self.packing.shape(self.packed)[1]

    @property
    def device(self) -> torch.device:
        return self.codes()[0].device

    @property
    def fallback_reason(self) -> str | None:
        return f"its weight is quantised ({self.packed_as})"

    @property
    def packed_as(self) -> str:
        return self.packing.label(self.packed)


def _other_map(layer: PackedLayer) -> str | None:
    """Returns why a layer computes something else than W x + bias, or gives its input another
    gradient than gᵀ W; None if it does neither. One input is tried.
    """
    what = f"{own_class(layer.module).__name__} ({layer.packing.label(layer.module)})"
    W = layer.weight()
    if W.is_meta:
        return None
    x = torch.linspace(-1, 1, 2 * W.shape[1], dtype=W.dtype, device=W.device).view(2, -1)
    bias = layer.bias
    held = None if bias is None else bias.data
    wanted = x.float() @ W.float().t() + (0 if bias is None else bias.detach().float())
    try:
        with torch.enable_grad():
            found = own_forward(layer.module, x.requires_grad_())
            gradient = _gradient(found, x)
    except RuntimeError as error:
        return f"the forward of {what} fails: {error}"
    finally:
        if bias is not None and held is not None:
            bias.data = held  # bitsandbytes casts it in place in a forward
    if gradient is None:
        return f"the forward of {what} gives its input no gradient"
    found = found.detach().float()
    if _distance(found, wanted) > _OUTPUT:
        return f"the forward of {what} computes something else than W x + bias"
    if _distance(gradient.float(), found @ W.float()) > _GRADIENT:
        return f"the gradient that {what} gives its input is not that of W x: nothing below would learn"
    return None


def _gradient(y: Tensor, x: Tensor) -> Tensor | None:
    """The gradient of y ∘ y / 2 [...] for x [...], or None if x has none."""
    if not y.requires_grad:
        return None
    (found,) = torch.autograd.grad(y.float().square().sum() / 2, x, allow_unused=True)
    return found


def _distance(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm().clamp_min(1e-30))
