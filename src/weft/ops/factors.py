"""The one form that every method of the family has for a layer, and the fast way through it.

    W' = σ ∘ (W + s diag(b) B diag(d) A)        y = x W'ᵀ + bias

    A [r, in], B [out, r]; d [r], b [out] and σ [out] or None for ones; s a number; σ is DoRA's m /
    ‖V‖

A method's own `forward` is the plain computation, from the layer's own output; `fused` does the
layer's whole work in one autograd function (fused.py). Tests hold the two equal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import cost, low_rank
from .fused import Adapted, folded


@dataclass(frozen=True, eq=False)
class Factors:
    """See the module's equation. `share(x, A, detached)`, where given, is x Aᵀ computed once for
    all readers of x.
    """

    A: Tensor
    B: Tensor
    d: Tensor | None = None
    b: Tensor | None = None
    s: float = 1.0
    sigma: Tensor | None = None
    m: Tensor | None = (
        None  # where given, σ is m / norm without its graph, norm is a constant, and m trains
    )
    norm: Tensor | None = None
    dropout: float = 0.0  # on x, before A; 0 outside training
    output_tells: bool = (
        False  # σ's gradient can be read off the layer's output (magnitude.output_tells)
    )
    # What was needed before for the input that is asked for, and may be written to: x Wᵀ [tokens,
    # out], or, where W' is built, V = W + C A [out, in]
    base: Tensor | None = None
    V: Tensor | None = None
    share: Callable[[Tensor, Tensor, bool], Tensor] | None = None

    def scale(self) -> Tensor | None:
        """σ with its graph to m."""
        if self.m is None or self.norm is None:
            return self.sigma
        return self.m.to(self.norm.dtype) / self.norm

    def folded(self, dtype: torch.dtype) -> Tensor:
        """C = s diag(b) B diag(d) [out, r] in `dtype`: with it W' = σ ∘ (W + C A)."""
        return folded(self.B, self.d, self.b, self.s, dtype)


def fused(x: Tensor, W: Tensor, bias: Tensor | None, f: Factors) -> Tensor:
    """y [..., out] from x [..., in], without another look at the layer. For when `paths.why_plain`
    finds no reason.
    """
    out, in_ = W.shape
    tokens, scaled = x.numel() // max(in_, 1), f.sigma is not None
    magnitude = f.sigma if f.m is None else f.m
    keep_straight = magnitude is not None and magnitude.requires_grad and not f.output_tells
    build = not keep_straight and f.base is None and builds(x, W, f, scaled)
    back = _may_build(x, f) and cost.build_backward(
        tokens, out, in_, f.A.shape[0], scaled, f.A.requires_grad
    )
    trained = [t for t in (f.A, f.B, f.d, f.b) if t is not None and t.requires_grad]
    h, A = None, f.A
    if (f.dropout or f.share is not None) and (not build or (torch.is_grad_enabled() and trained)):
        # Where the backward pass goes through W', h is only there for the gradients of the small
        # tensors.
        h, A = _down(x, f, detached=back), A.detach()
    y: Tensor = Adapted.apply(  # type: ignore[no-untyped-call]
        x,
        h,
        f.V if build else f.base,
        W,
        bias,
        A,
        f.B,
        f.d,
        f.b,
        f.sigma,
        f.m,
        f.norm,
        f.s,
        build,
        back,
        keep_straight,
    )
    return y


def builds(x: Tensor, W: Tensor, f: Factors, scaled: bool) -> bool:
    """Whether the output is computed through W' = σ ∘ (W + C A); `scaled`: there is a σ."""
    out, in_ = W.shape
    return _may_build(x, f) and cost.build_forward(
        x.numel() // max(in_, 1), out, in_, f.A.shape[0], scaled
    )


def _may_build(x: Tensor, f: Factors) -> bool:
    # A built W' in bfloat16 would round small updates away, and dropout is on the update's input
    # alone.
    return x.dtype in (torch.float32, torch.float64) and not f.dropout


def _down(x: Tensor, f: Factors, detached: bool) -> Tensor:
    if f.share is not None and not f.dropout:
        return f.share(x, f.A, detached)
    return low_rank.down(x.detach() if detached else x, f.A, f.dropout, f.dropout > 0, x.dtype)
