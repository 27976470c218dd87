"""Convolutions of torch in one, two and three dimensions, also transposed: W is the kernel as
[out, in / groups · k] (ops/convolution.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
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
        own = own_class(module).__name__ if _has_own_padding(module) else None
        self.geometry = Geometry(
            inputs, size, m.groups, tuple(m.dilation), own or m.padding_mode, m.transposed
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
        fault = weight_fault(module, dims + 2) or _packed(module)
        return _other_map(cls(module), plain) if fault is None else fault

    def matrix(self, stored: Tensor) -> Tensor:
        """Returns W [out, in / groups · k] of a kernel as torch stores it."""
        return self.geometry.matrix(stored)

    def stored(self, W: Tensor) -> Tensor:
        """Returns the kernel as torch stores it of W [out, in / groups · k]."""
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
        """Returns 1 (channels) and the dimensions of the positions; x [..., in, *positions]."""
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

        `like`: an output with the positions to compute, of a transposed convolution, whose caller
        may have asked for another size than the usual one.
        """
        module: Any = self.module
        if not module.transposed:  # also of an instance that was given another padding
            found: Tensor = module._conv_forward(x, kernel, bias)
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
        """See `BaseLayer.adapted`; y [..., out, *positions]."""
        h = self.down(x, f.A, dropout, y.dtype, like=y)
        return self.geometry.adapted(y, h, self.bias, f, norm)

    def change(
        self, x: Tensor, y: Tensor, f: LowRank, norm: Tensor | None, dropout: float
    ) -> Tensor:
        """See `BaseLayer.change`; y [..., out, *positions]."""
        h = self.down(x, f.A, dropout, y.dtype, like=y)
        return self.geometry.change(y, h, self.bias, f, norm)

    @property
    def fallback_reason(self) -> str | None:
        if INNER_FORWARD in self.module.__dict__:
            return "another library has put its own forward on the layer"
        plain, cls = _plain_class(self.module), own_class(self.module)
        if plain is None or cls.forward is not plain.forward:
            return f"{cls.__name__} has a forward of its own"
        return None


def _plain_class(module: nn.Module) -> type[nn.Module] | None:
    """The class of torch that a convolution is, or derives from."""
    return next((cls for cls in own_class(module).__mro__ if cls in _PLAIN), None)


def _packed(module: nn.Module) -> str | None:
    """Why a weight of a tensor class of its own cannot be adapted; sharded ones are of torch."""
    kind = type(module._parameters["weight"])
    if kind.__module__.partition(".")[0] == "torch":
        return None
    return f"its weight is packed ({kind.__name__}), and Weft unpacks those of linear layers only"


def _has_own_padding(module: nn.Module) -> bool:
    """Whether the function of input, kernel and bias behind the forward is not torch's."""
    name = "_conv_forward"
    own = getattr(own_class(module), name, None) is not getattr(_plain_class(module), name, None)
    return own or name in module.__dict__


def _other_map(layer: ConvolutionLayer, plain: type[nn.Module]) -> str | None:
    """Returns why a convolution with its own forward is another map than W ∗ x + bias, or None. Two
    inputs are tried, of an even and an odd size.
    """
    module, cls = layer.module, own_class(layer.module)
    kernel: Tensor = module.weight.detach()  # type: ignore[operator]
    usual = cls.forward is plain.forward
    if (usual and not _has_own_padding(module)) or kernel.is_meta or not kernel.numel():
        return None
    try:
        with torch.no_grad():
            for x in _examples(module, kernel):
                wanted = layer.run(x, kernel, layer.bias)
                if not usual and not _close(cls.forward(module, x), wanted):
                    return f"the forward of {cls.__name__} computes something else than {plain.__name__}"
                if _has_own_padding(module) and not _is_linear(layer, x, kernel):
                    return f"the _conv_forward of {cls.__name__} is not linear in the kernel"
    except Exception as error:  # it needs other arguments, or fails on them
        return f"the forward of {cls.__name__} fails on an input like any other ({error})"
    return None


def _examples(module: Any, kernel: Tensor) -> Iterator[Tensor]:
    for extra in (2, 5):
        sides = zip(module.dilation, module.kernel_size, module.stride, strict=True)
        size = (1, module.in_channels, *(d * (k - 1) + s + extra for d, k, s in sides))
        numbers = torch.linspace(-1, 1, math.prod(size), dtype=kernel.dtype, device=kernel.device)
        yield numbers.view(size)


def _is_linear(layer: ConvolutionLayer, x: Tensor, kernel: Tensor) -> bool:
    """Whether the output is linear in the kernel, also for other numbers of outputs."""
    W = layer.geometry.matrix(kernel)
    other = torch.linspace(-1, 1, W.numel(), dtype=W.dtype, device=W.device).view_as(W) + W.flip(1)
    first, second, both = (
        layer.run(x, layer.geometry.kernel(each)) for each in (W, other, W + other)
    )
    thin = layer.run(x, layer.geometry.thin(W[:1]))
    return _close(first + second, both) and _close(thin[:, :1], first[:, :1])


def _close(found: Any, wanted: Tensor) -> bool:
    if not isinstance(found, Tensor) or found.shape != wanted.shape:
        return False
    limit = ROUNDING[wanted.dtype] * wanted.abs().max()
    return bool((found - wanted).abs().max() <= limit)
