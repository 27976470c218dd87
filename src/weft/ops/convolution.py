"""Convolutions as linear maps: the kernel as W [out, in / groups · k], and an update beside the
layer.

    y[o] = Σ W[o, (i, k)] x[i, shifted by k]        i: the inputs of o's group,  k: the places of the kernel

    y += C ∗ h,    h = A ∗ x        A [r, in / groups · k] as a kernel with r outputs per group,
                                    C = s diag(b) B diag(d) [out, r] as a kernel of one place

A convolution is linear in its kernel, so this is exact, with groups, dilation, stride and any
padding, and for transposed ones. Channels come before positions: x is [rows, in, *positions], or
[in, *positions].
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from . import native
from .low_rank import LowRank, row_scale, scaled
from .norm import row_norm
from .plan import PER_NUMBER, may_build

_POINTWISE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True)
class Geometry:
    """What a kernel means. `inputs`: the channels that one output reads, in / groups. `size`: that
    of the kernel, per dimension.
    """

    inputs: int
    size: tuple[int, ...]
    groups: int = 1
    dilation: tuple[int, ...] = ()
    padding_mode: str = "zeros"
    transposed: bool = False

    def __str__(self) -> str:
        parts = [f"of {_by(self.size)} over {self.inputs} channels"]
        parts += [f"{self.groups} groups"] if self.groups > 1 else []
        parts += [f"dilation {_by(self.dilation)}"] if max(self.dilation, default=1) > 1 else []
        parts += [f"padding by {self.padding_mode}"] if self.padding_mode != "zeros" else []
        return ", ".join([*parts, *(["transposed"] if self.transposed else [])])

    @property
    def width(self) -> int:
        """in / groups · k."""
        return self.inputs * math.prod(self.size)

    def matrix(self, kernel: Tensor) -> Tensor:
        """Returns W [out, in / groups · k] for a kernel as torch stores it: [out, in / groups,
        *size], or transposed [in, out / groups, *size]. It is a view if the memory allows it.
        """
        if self.transposed:
            kernel = kernel.reshape(self.groups, self.inputs, *kernel.shape[1:])
            kernel = kernel.transpose(1, 2).flatten(0, 1)
        return kernel.flatten(1)

    def kernel(self, W: Tensor) -> Tensor:
        """Returns the kernel as torch stores it, for W [out, in / groups · k]: undoes `matrix`."""
        found = W.reshape(len(W), self.inputs, *self.size)
        if self.transposed:
            found = found.reshape(self.groups, -1, *found.shape[1:])
            found = found.transpose(1, 2).flatten(0, 1)
        return found

    def thin(self, A: Tensor) -> Tensor:
        """Returns the kernel of A [r, in / groups · k], with r outputs per group."""
        return self.kernel(A.repeat(self.groups, 1) if self.groups > 1 else A)

    def along(self, vector: Tensor) -> Tensor:
        """Returns a vector [out] as [out, 1, ...], along the channels of an output."""
        return vector.reshape(*vector.shape, *(1,) * len(self.size))

    def up(self, h: Tensor, f: LowRank) -> Tensor:
        """Returns C ∗ h [..., out, *positions] in h's dtype, for h [..., groups · r, *positions]."""
        C = f.up(h.dtype)
        out: Tensor = _POINTWISE[len(self.size)](h, self.along(C), groups=self.groups)
        return out

    def adapted(
        self, y: Tensor, h: Tensor, bias: Tensor | None, f: LowRank, norm: Tensor | None = None
    ) -> Tensor:
        """Returns the layer's output [..., out, *positions] from its own, y, and h = A ∗ x.

        `norm` is ‖W + ΔW‖ [out] if f has an m.
        """
        y = y + self.up(h.to(y.dtype), f).to(y.dtype)
        if f.m is None or norm is None:
            return y
        sigma = self.along(row_scale(f.m, norm))
        return scaled(y, None if bias is None else self.along(bias), sigma)

    def change(
        self, y: Tensor, h: Tensor, bias: Tensor | None, f: LowRank, norm: Tensor | None = None
    ) -> Tensor:
        """Returns `adapted` - y, without the cancellation of that difference, in σ's dtype."""
        update = self.up(h.to(y.dtype), f).to(y.dtype)
        if f.m is None or norm is None:
            return update
        sigma = self.along(row_scale(f.m, norm))
        return sigma * update + (sigma - 1) * (y if bias is None else y - self.along(bias))


def _by(sizes: tuple[int, ...]) -> str:
    return " x ".join(map(str, sizes))


def builds(
    x: Tensor, positions: int, geometry: Geometry, out: int, r: int, scaled: bool, grad: bool
) -> bool:
    """Whether y of x is cheaper through a built W' than by an update beside W: a count of
    operations, as in plan.py, for that many positions of the output in all rows.

    With gradients W' has one of its own, as large as W, which costs a third convolution.
    """
    if not may_build(x):
        return False
    in_, groups = geometry.width, geometry.groups
    passes = PER_NUMBER * out * (3 if scaled else 2)
    beside = positions * (r * groups * in_ + r * out + passes)
    built = out * in_ * (r + PER_NUMBER * (6 if scaled else 4))
    if grad:
        beside, built = 3 * beside, 3 * built + positions * out * in_
    return bool(built < beside)


def built(W: Tensor, f: LowRank, geometry: Geometry) -> Tensor:
    """Returns the kernel of W' with its graph, in W's dtype, for W [out, in / groups · k].

    The norm is that of V at hand, a constant for the gradient.
    """
    V = native.built(W, f)
    if f.m is not None:
        V = V * row_scale(f.m, row_norm(V.detach())).to(V.dtype)[:, None]
    return geometry.kernel(V).contiguous()
