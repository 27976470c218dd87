"""Convolutions of torch in one, two and three dimensions, also transposed: W is the kernel as
[out, in / groups · k] (ops/convolution.py).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ops.convolution import Geometry
from ...ops.low_rank import LowRank
from .base import INNER_FORWARD, ROUNDING, BaseLayer, own_class, weight_fault

_PLAIN = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


class ConvolutionLayer(BaseLayer):
    """y = W ∗ x + bias, with any stride, padding, dilation and groups."""

    kind = "convolution"
    is_convolution = True
    geometry: Geometry

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        m: Any = module
        inputs, size = m.in_channels // m.groups, tuple(m.kernel_size)
        self.geometry = Geometry(
            inputs, size, m.groups, tuple(m.dilation), m.padding_mode, m.transposed
        )

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return isinstance(module, nn.modules.conv._ConvNd)

    @classmethod
    def why_not(cls, module: nn.Module) -> str | None:
        plain = _plain_class(module)
        if plain is None:
            return f"{own_class(module).__name__} derives from no convolution of torch"
        dims = len(module.kernel_size)  # type: ignore[arg-type]
        fault = weight_fault(module, dims + 2)
        return _other_map(cls(module), plain) if fault is None else fault

    def matrix(self, stored: Tensor) -> Tensor:
        return self.geometry.matrix(stored)

    def stored(self, W: Tensor) -> Tensor:
        return self.geometry.kernel(W)

    def weight(self) -> Tensor:
        """Returns W [out, in / groups · k]; see `is_view`."""
        kernel: Tensor = self.module.weight  # type: ignore[assignment]
        return self.geometry.matrix(kernel)

    @property
    def is_view(self) -> bool:
        kernel: Tensor = self.module.weight  # type: ignore[assignment]
        return kernel.is_contiguous() and not self.geometry.transposed

    @property
    def out_features(self) -> int:
        module: Any = self.module
        return int(module.out_channels)

    @property
    def in_features(self) -> int:
        return self.geometry.width

    @property
    def device(self) -> torch.device:
        return self.module.weight.device  # type: ignore[return-value]

    def feature_dims(self, x: Tensor, y: Tensor) -> int:
        return len(self.geometry.size) + 1

    def positions(self, x: Tensor) -> int:
        """About how many positions the output has, in all rows of x [..., in, *positions]."""
        module: Any = self.module
        count, strides = x.numel() // max(1, module.in_channels), math.prod(module.stride)
        return int(count * strides if module.transposed else count // strides)

    def run(
        self, x: Tensor, kernel: Tensor, bias: Tensor | None = None, like: Tensor | None = None
    ) -> Tensor:
        """Returns the layer's output with another kernel, of any number of outputs, and bias.

        `like`: an output with the positions to compute, of a transposed convolution, whose caller may
        have asked for another size than the usual one.
        """
        module: Any = self.module
        if not module.transposed:
            plain: Any = _plain_class(module)
            found: Tensor = plain._conv_forward(module, x, kernel, bias)
            return found
        dims = len(module.kernel_size)
        padding = tuple(module.output_padding)
        if like is not None:
            padding = tuple(
                size - ((n - 1) * stride - 2 * pad + dilation * (k - 1) + 1)
                for size, n, stride, pad, dilation, k in zip(
                    like.shape[-dims:],
                    x.shape[-dims:],
                    module.stride,
                    module.padding,
                    module.dilation,
                    module.kernel_size,
                    strict=True,
                )
            )
        out: Tensor = _TRANSPOSED[dims](
            x, kernel, bias, module.stride, module.padding, padding, module.groups, module.dilation
        )
        return out

    def down(
        self,
        x: Tensor,
        A: Tensor,
        dropout: float = 0.0,
        dtype: torch.dtype | None = None,
        like: Tensor | None = None,
    ) -> Tensor:
        """Returns A ∗ dropout(x) [..., groups · r, *positions] for A [r, in / groups · k]."""
        kernel = self.geometry.thin(A.to(dtype or A.dtype))
        x = F.dropout(x, dropout) if dropout else x
        return self.run(x.to(kernel.dtype), kernel, None, like)

    def adapted(
        self, x: Tensor, y: Tensor, f: LowRank, norm: Tensor | None, dropout: float
    ) -> Tensor:
        h = self.down(x, f.A, dropout, y.dtype, like=y)
        return self.geometry.adapted(y, h, self.bias, f, norm)

    def change(
        self, x: Tensor, y: Tensor, f: LowRank, norm: Tensor | None, dropout: float
    ) -> Tensor:
        h = self.down(x, f.A, dropout, y.dtype, like=y)
        return self.geometry.change(y, h, self.bias, f, norm)

    @property
    def fallback_reason(self) -> str | None:
        if INNER_FORWARD in self.module.__dict__:
            return "another library has put its own forward on the layer"
        plain, cls = _plain_class(self.module), own_class(self.module)
        if plain is None or not _computes_as(cls, plain):
            return f"{cls.__name__} has a forward of its own"
        return None


def _plain_class(module: nn.Module) -> type[nn.Module] | None:
    """The class of torch that a convolution is, or derives from."""
    return next((cls for cls in own_class(module).__mro__ if cls in _PLAIN), None)


def _computes_as(cls: Any, plain: Any) -> bool:
    names = ("forward", "_conv_forward")
    return all(getattr(cls, n, None) is getattr(plain, n, None) for n in names)


def _other_map(layer: ConvolutionLayer, plain: type[nn.Module]) -> str | None:
    """Returns why a subclass with its own forward is another map than W ∗ x + bias, or None. Two inputs
    are tried, of an even and an odd size.
    """
    module, cls = layer.module, own_class(layer.module)
    kernel: Tensor = module.weight  # type: ignore[assignment]
    if _computes_as(cls, plain) or kernel.is_meta or not kernel.numel():
        return None
    reason = f"the forward of {cls.__name__} computes something else than {plain.__name__}"
    m: Any = module
    for extra in (2, 5):
        size = [
            d * (k - 1) + s + extra
            for d, k, s in zip(m.dilation, m.kernel_size, m.stride, strict=True)
        ]
        x = torch.linspace(
            -1, 1, m.in_channels * int(torch.tensor(size).prod()), dtype=kernel.dtype
        ).to(kernel.device)
        x = x.view(1, m.in_channels, *size)
        try:
            with torch.no_grad():
                wanted = layer.run(x, kernel, layer.bias)
                found = cls.forward(module, x)
        except Exception:  # it needs other arguments, or fails on them
            return reason
        if not isinstance(found, Tensor) or found.shape != wanted.shape:
            return reason
        if bool((found - wanted).abs().max() > ROUNDING[kernel.dtype] * wanted.abs().max()):
            return reason
    return None
