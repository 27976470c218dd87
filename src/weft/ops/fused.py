"""A layer and its update in one autograd function, which keeps the least for backward.

    y = σ ∘ (x Wᵀ + s h Bᵀ) + bias          h = x Aᵀ [tokens, r], made outside (low_rank.py), so that layers may share it

Kept: h, B, σ and, where σ trains, y itself, which the next layer mostly keeps too; references to W, A and bias. Neither x (A
keeps it, if A trains) nor a product of y's size. With z = y - bias and upstream gradient g:

    grad x = (σ ∘ g) W [+ s (σ ∘ g) B A, through h]     grad h = s (σ ∘ g) B        grad B = s (σ ∘ g)ᵀ h
    grad σ = Σ_tokens g ∘ z / σ

`build` and `back` go through W' = σ ∘ (W + s B A) forwards and backwards (cost.py says when): h then has no gradient to x.
`keep_straight` keeps z / σ apart, for a σ that would lose it (zero, or far below the bias). There is no second derivative.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import kernels

_ROWS = 1024  # tokens of which a product of the output's size is held at one time


class Adapted(torch.autograd.Function):
    """See the module's equation. x [..., in], h [..., r] or None (build without gradients), W [out, in] -> y [..., out]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, h: Tensor | None, W: Tensor, bias: Tensor | None, A: Tensor | None, B: Tensor,
                sigma: Tensor | None, s: float, build: bool, back: bool, keep_straight: bool) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        low = None if h is None else h.reshape(-1, h.shape[-1])
        straight = None
        if build:
            assert A is not None
            y = _affine(rows, built(W, A, B, s, sigma), bias)
        else:
            assert low is not None
            y = _affine(rows, W, bias)
            if sigma is not None and not keep_straight and kernels.use(y):
                kernels.compose_up(y[None], low[None], B, s, sigma, bias)
            else:
                y.addmm_(low, B.t(), alpha=s)
                if sigma is not None:
                    straight = (y if bias is None else y - bias) if keep_straight else None
                    y = scaled(y, bias, sigma, inplace=straight is not y)
        out = y.view(*x.shape[:-1], W.shape[0])
        keeps_output = sigma is not None and sigma.requires_grad and not keep_straight
        ctx.save_for_backward(low, W, bias, A, B, sigma, out if keeps_output else None, straight)
        ctx.s, ctx.back, ctx.shape = s, back, x.shape
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        h, W, bias, A, B, sigma, out, straight = ctx.saved_tensors
        need_x, need_h, _, _, _, need_B, need_sigma = ctx.needs_input_grad[:7]
        g, s = grad.reshape(-1, grad.shape[-1]), ctx.s
        grad_x = grad_h = grad_B = grad_sigma = None
        if need_B:
            grad_B = _row_scaled(torch.mm(g.t(), h), sigma, s)
        scaled_g = None
        if need_sigma:
            total, scaled_g = _dot_and_scaled(g, out, straight, bias, sigma, need_x and not ctx.back)
            grad_sigma = (total if out is None else total / sigma.to(total.dtype)).to(sigma.dtype)
        if need_h:
            grad_h = torch.mm(g, _row_scaled(B, sigma, s)).view(*ctx.shape[:-1], h.shape[1])
        if need_x:
            grad_x = (torch.mm(scaled_g, W) if scaled_g is not None
                      else _grad_x(g, W, A, B, sigma, s, ctx.back)).view(ctx.shape)
        return grad_x, grad_h, None, None, None, grad_B, grad_sigma, None, None, None, None


def built(W: Tensor, A: Tensor, B: Tensor, s: float, sigma: Tensor | None) -> Tensor:
    """W' [out, in], laid out in memory as W is, so that one fast product reads both."""
    if sigma is not None:
        sigma = sigma.to(W.dtype)
        W, B = W * sigma[:, None], B * sigma[:, None]
        return W.addmm_(B, A, alpha=s) if W.is_contiguous() else W.t().addmm_(A.t(), B.t(), alpha=s).t()
    return torch.addmm(W, B, A, alpha=s) if W.is_contiguous() else torch.addmm(W.t(), A.t(), B.t(), alpha=s).t()


def scaled(y: Tensor, bias: Tensor | None, sigma: Tensor, inplace: bool = False) -> Tensor:
    """σ (y - bias) + bias, which is y bit for bit where σ is 1; in y's dtype, from a σ that may be wider."""
    out = y if inplace else torch.empty_like(y)
    if sigma.dtype == y.dtype and bias is not None:
        return torch.addcmul(bias - sigma * bias, y, sigma, out=out)
    more = (sigma - 1).to(y.dtype)  # the difference in σ's own dtype: σ rounded to bfloat16 would be 1 for most rows
    torch.addcmul(y, y, more, out=out)
    return out if bias is None else out.sub_(more * bias)


def _affine(x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
    return torch.mm(x, W.t()) if bias is None else torch.addmm(bias, x, W.t())


def _row_scaled(B: Tensor, sigma: Tensor | None, s: float) -> Tensor:
    """s σ ∘ B row by row, in B's dtype."""
    if sigma is not None:
        return (B * (s * sigma)[:, None]).to(B.dtype)
    return B if s == 1.0 else B * s


def _grad_x(g: Tensor, W: Tensor, A: Tensor, B: Tensor, sigma: Tensor | None, s: float, back: bool) -> Tensor:
    if back:
        return torch.mm(g, built(W, A, B, s, sigma))
    if sigma is None:
        return torch.mm(g, W)
    if g.shape[0] > W.shape[1] and sigma.dtype == W.dtype:  # the smaller of the two takes the scale
        return torch.mm(g, W * sigma[:, None])
    return torch.mm(scaled(g, None, sigma), W)


def _dot_and_scaled(g: Tensor, out: Tensor | None, straight: Tensor | None, bias: Tensor | None, sigma: Tensor,
                    wanted: bool) -> tuple[Tensor, Tensor | None]:
    """Σ_tokens g ∘ z [out], in float32 or wider, of z = y - bias or of z / σ where that was kept; and σ ∘ g, where it is
    wanted and costs nothing more.
    """
    kept = straight if straight is not None else out
    assert kept is not None
    y, bias = kept.view(g.shape), bias if straight is None else None
    if wanted and kernels.use(g):
        scaled_g, total = kernels.compose_grad(g, y, sigma, bias)
        return total, scaled_g
    total = _dot(g, y)
    return total if bias is None else total - bias.to(total.dtype) * g.sum(0, dtype=total.dtype), None


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Σ over rows of a ∘ b. An einsum over the rows would be many times slower on a CPU."""
    wide = torch.float64 if a.dtype == torch.float64 else torch.float32
    total = torch.zeros(a.shape[1], dtype=wide, device=a.device)
    for start in range(0, a.shape[0], _ROWS):
        part = slice(start, start + _ROWS)
        total += (a[part].to(wide) * b[part].to(wide)).sum(0)
    return total
