"""How an adapted convolution computes its output: by an update beside the layer, or through a built
W', whichever takes fewer operations (ops/convolution.py).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..ops import convolution
from ..ops.low_rank import LowRank
from .base_layers.convolution import ConvolutionLayer
from .layer_plan import LayerPlan


class ConvolutionPlan(LayerPlan):
    """A plan whose `compute` takes x [..., in, *positions]."""

    def compute(self, layer: Any, x: Tensor) -> Tensor:
        """Returns the layer's output [..., out, *positions] with its adapter."""
        f: LowRank = self._f if self._f is not None else layer.factors()
        base: ConvolutionLayer = layer.base
        if self._may_build and self._builds(layer, x, f):
            return base.run(x, convolution.built(base.weight(), f, base.geometry), self.bias)
        y = base.run(x, self.W, self.bias)
        scale = layer.row_scale(f)
        return base.adapted(x, y, f, None if scale is None else scale.norm, self._dropout)

    def _builds(self, layer: Any, x: Tensor, f: LowRank) -> bool:
        base, out = layer.base, layer.shape[0]
        positions = base.positions(x)
        scaled = f.m is not None
        return convolution.builds(x, positions, base.geometry, out, len(f.A), scaled, self.grad)

    def _decide(self, layer: Any) -> None:
        f: LowRank = layer.factors()
        if f.norm_grad:
            self.reason = "the gradient flows through the norm"
        self._dropout = layer.method.dropout if self.training else 0.0
        self._sources, fixed = self._places(layer, f)
        self._A, self._A_dtype = f.A, f.A.dtype
        self._f = f if fixed else None
        # The layout of the kernel decides how the sums are rounded, and a built one is contiguous.
        alike = self.W is not None and self.W.is_contiguous()
        own = [t for t in f.tensors() if t is not f.d or fixed]
        self._may_build = alike and not self._dropout and all(t.dtype is self.dtype for t in own)


def plan_of(layer: Any, x: Tensor) -> LayerPlan:
    """Returns how a layer computes its output for inputs like x."""
    return (ConvolutionPlan if layer.base.is_convolution else LayerPlan)(layer, x)
