"""The one form of the low-rank family, and everything that follows from it.

    W' = σ ∘ (W + ΔW)        ΔW = s diag(b) B diag(d) A [out, in]
    y  = x W'ᵀ + bias        σ  = m / ‖W + ΔW‖ per row, or 1 without m

    A [r, in]    B [out, r]    d [r], b [out], m [out]: None means ones

For a stack of weights [E, out, in] all tensors but those that the weights share have E in front.

`LowRank.weight` is the definition: merge, export, analysis and the tests' oracle use it. A layer
computes y by `native.py` or `fused.py`; the tests hold all three equal.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .norm import at_least_float32, row_norm


@dataclass(frozen=True, eq=False, slots=True)
class LowRank:
    """See the module's equation."""

    A: Tensor
    B: Tensor
    d: Tensor | None = None
    b: Tensor | None = None
    s: float = 1.0
    m: Tensor | None = None
    norm_grad: bool = False  # the gradient also flows through ‖W + ΔW‖
    sources: tuple[Tensor, ...] = ()  # the tensors that A and B were computed from, if they were

    def up(self, dtype: torch.dtype) -> Tensor:
        """Returns s diag(b) B diag(d) [out, r], computed in `dtype` or wider and cast once.

        It is B itself if there is nothing to multiply and nothing to cast.
        """
        wide = torch.promote_types(self.B.dtype, dtype)
        up = self.B.to(wide)
        if self.d is not None:
            d = self.d.to(wide) if self.d.ndim == 1 else self.d.to(wide).unsqueeze(-2)
            up = up * (d if self.s == 1.0 else self.s * d)
        elif self.s != 1.0:
            up = up * self.s
        if self.b is not None:
            up = up * self.b.to(wide)[..., None]
        return up.to(dtype)

    def delta(self, dtype: torch.dtype) -> Tensor:
        """Returns ΔW [out, in] in `dtype`."""
        return self.up(dtype) @ self.A.to(dtype)

    def weight(self, W: Tensor) -> Tensor:
        """Returns W' [out, in] for W [out, in], in float32 or wider."""
        W = at_least_float32(W)
        V = W + self.delta(W.dtype)
        return V if self.m is None else row_scale(self.m, row_norm(V))[..., None] * V

    def tensors(self) -> tuple[Tensor, ...]:
        """Returns the tensors that are not None: A [r, in], B [out, r], then d [r], b [out] and m
        [out].
        """
        return tuple(t for t in (self.A, self.B, self.d, self.b, self.m) if t is not None)

    def stored(self) -> tuple[Tensor, ...]:
        """Returns the tensors that decide all others: `tensors`, with `sources` in place of A and
        B.
        """
        return (*self.sources, *self.tensors()[2:]) if self.sources else self.tensors()


def added(W: Tensor, up: Tensor, A: Tensor, s: float = 1.0) -> Tensor:
    """Returns W + s up A [out, in] with its graph, for up [out, r] and A [r, in], laid out as W is:
    so that a product with it, or its norm, rounds as that of W does.
    """
    if not W.is_contiguous() and W.t().is_contiguous():
        return torch.addmm(W.t(), A.t(), up.t(), alpha=s).t()
    return torch.addmm(W, up, A, alpha=s)


def row_scale(m: Tensor, norm: Tensor) -> Tensor:
    """Returns σ = m / ‖V‖ [out] in norm's dtype, for m [out] and norm [out]."""
    return m.to(norm.dtype) / norm


def scaled(y: Tensor, bias: Tensor | None, sigma: Tensor, out: Tensor | None = None) -> Tensor:
    """Returns σ (y - bias) + bias in y's dtype, for y [..., out], bias [out] and σ [out] or [...,
    out].

    It is y bit for bit if σ is 1. σ may be wider than y: the product is taken in σ's dtype and
    rounded once. With `out` the result is written there, without a graph.
    """
    if bias is None:
        found = torch.mul(y, sigma, out=out)
    else:
        found = torch.addcmul(bias - sigma * bias, y, sigma, out=out)
    return found.to(y.dtype)
