"""A layer and its update in one autograd function, which keeps the least for backward.

    y = σ ∘ (x Wᵀ + h Cᵀ) + bias      C = s diag(b) B diag(d) [out, r]      σ = m / norm
                                      h = x Aᵀ [tokens, r]; computed outside if layers share it or x is dropped

Kept: h and, if m trains, y itself, which the next layer may keep too; references to W, A, B, bias
and the vectors; x if A trains. Not C, and no other product of y's size. With z = y - bias and
upstream gradient g:

    grad h = (σ ∘ g) C          grad A = (grad h)ᵀ x          grad x = (σ ∘ g) W + (grad h) A
    grad C = (σ ∘ g)ᵀ h, from which grad b = s (B ∘ grad C) d, grad d = s bᵀ (B ∘ grad C), grad B = s diag(b) grad C diag(d)
    grad m = Σ_tokens g ∘ z / σ / norm                              grad bias = Σ_tokens g

`build` and `back` go through W' = σ ∘ (W + C A) forwards and backwards (plan.py says when).
`keep_straight` keeps z / σ, for a σ that would lose it (zero, or far below the bias). There is no
second derivative.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import kernels, plan
from .low_rank import LowRank, scaled
from .projection import down
from .row_scale import Ready, RowScale
from .scratch import built, scratch

_BLOCK = 1 << 17  # numbers of a block of sums
SharedDown = Callable[[Tensor, Tensor, bool], Tensor]


@dataclass(frozen=True, eq=False, slots=True)
class _Call:
    """What one call of the function reads beside the tensors that may get a gradient."""

    W: Tensor
    s: float
    scale: RowScale | None
    ready: Ready
    build: bool
    back: bool
    keep_straight: bool


def fused(
    x: Tensor,
    W: Tensor,
    bias: Tensor | None,
    f: LowRank,
    scale: RowScale | None = None,
    ready: Ready | None = None,
    *,
    build: bool = False,
    dropout: float = 0.0,
    written: bool = False,
    shared_down: SharedDown | None = None,
) -> Tensor:
    """Returns y [..., out] for x [..., in], frozen W [out, in] and bias [out].

    `scale` and `ready` are σ and its by-products if f has an m; `build` goes through W'. `dropout`
    acts on x before A. `written`: the output may be written to, so it cannot be kept.
    `shared_down(x, A, detached)` is x Aᵀ computed once for all layers that read x.
    """
    out, in_ = W.shape
    tokens = x.numel() // max(in_, 1)
    ready = Ready() if ready is None else ready
    trains_m = f.m is not None and f.m.requires_grad and torch.is_grad_enabled()
    keep_straight = trains_m and scale is not None and (written or not scale.output_tells)
    build = build and not keep_straight and ready.base is None
    back = (
        plan.may_build(x)
        and not dropout
        and plan.build_backward(
            tokens, out, in_, f.A.shape[0], scale is not None, f.A.requires_grad
        )
    )
    h, A = None, f.A
    trains = torch.is_grad_enabled() and any(t.requires_grad for t in f.tensors())
    if (dropout or shared_down is not None) and (not build or trains):
        # If the backward pass goes through W', h only serves the gradients of the small tensors.
        if shared_down is not None and not dropout:
            h = shared_down(x, A, back)
        else:
            h = down(x.detach() if back else x, A, dropout, dropout > 0, x.dtype)
        A = A.detach()
    call = _Call(W, f.s, scale, ready, build, back, keep_straight)
    y: Tensor = _Fused.apply(x, h, A, f.B, f.d, f.b, f.m, bias, call)  # type: ignore[no-untyped-call]
    return y


class _Fused(torch.autograd.Function):
    """See the module's equation. x [..., in], h [..., r] or None -> y [..., out]."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        h: Tensor | None,
        A: Tensor,
        B: Tensor,
        d: Tensor | None,
        b: Tensor | None,
        m: Tensor | None,
        bias: Tensor | None,
        call: _Call,
    ) -> Tensor:
        C = LowRank(A, B, d, b, call.s).up(x.dtype)
        need_A, need_small = ctx.needs_input_grad[2], any(ctx.needs_input_grad[2:6])
        low = None if h is None else h.reshape(-1, h.shape[-1])
        if low is None and (need_small or not call.build):
            low = torch.mm(x.reshape(-1, x.shape[-1]), A.to(x.dtype).t())
        y, straight = _output(x, low, A, C, bias, call)
        # Not a view: what follows may write to it (ReLU(inplace=True), +=), which torch forbids on
        # views that a function returns.
        out: Tensor = torch.ops.aten._unsafe_view(y, [*x.shape[:-1], call.W.shape[0]])
        keeps_output = ctx.needs_input_grad[6] and not call.keep_straight
        ctx.save_for_backward(
            x if need_A else None,
            low if need_small else None,
            call.W,
            bias,
            A,
            B,
            d,
            b,
            None if call.scale is None else call.scale.sigma,
            None if call.scale is None else call.scale.norm,
            out if keeps_output else None,
            straight,
        )
        ctx.s, ctx.back, ctx.shape, ctx.h_is_given = call.s, call.back, x.shape, h is not None
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, h, W, bias, A, B, d, b, sigma, norm, out, straight = _saved(ctx)
        need_x, need_h, need_A, need_B, need_d, need_b, need_m, need_bias = ctx.needs_input_grad[:8]
        g, s, back = grad.reshape(-1, grad.shape[-1]), ctx.s, ctx.back
        grad_A = grad_m = grad_x = scaled_g = low_g = None
        grad_bias = g.sum(0).to(bias.dtype) if need_bias else None
        vectors: tuple[Tensor | None, ...] = (None, None, None)
        if need_m:
            total, scaled_g = _dot_and_scaled(g, out, straight, bias, sigma, need_x and not back)
            grad_m = (total if out is None else total / sigma).to(sigma.dtype) / norm
        if (
            scaled_g is None
            and need_x
            and not back
            and sigma is not None
            and _scales_gradient(g, W, sigma)
        ):
            scaled_g = scaled(g, None, sigma, out=scratch("σ g", g.shape[0], g.shape[1], g))
        if scaled_g is not None:  # then nothing else needs the scale
            g, sigma = scaled_g, None
        if need_B or need_d or need_b:
            # The smaller factor is transposed; what is multiplied with B afterwards is laid out as B.
            grad_C = torch.mm(h.t(), g).t() if d is None and b is None else _wide_mm(g.t(), h)
            grad_C = _row_scaled(grad_C, sigma, s)
            vectors = _unfolded(grad_C, B, d, b, (need_B, need_d, need_b))
        beside = need_x and not back and not ctx.h_is_given
        C = LowRank(A, B, d, b, s).up(g.dtype) if need_h or need_A or need_x else None
        if C is not None and (need_h or need_A or beside):
            low_g = torch.mm(g, _row_scaled(C, sigma))
        if need_A and low_g is not None:
            grad_A = torch.mm(low_g.t(), x.reshape(-1, x.shape[-1])).to(A.dtype)
        if need_x:
            grad_x = _grad_x(g, W, A, C, sigma, back)
            if beside and low_g is not None:
                grad_x.addmm_(low_g, A.to(g.dtype))
            grad_x = grad_x.view(ctx.shape)
        grad_h = (
            low_g.view(*ctx.shape[:-1], low_g.shape[1]) if need_h and low_g is not None else None
        )
        return grad_x, grad_h, grad_A, *vectors, grad_m, grad_bias, None


def _output(
    x: Tensor, low: Tensor | None, A: Tensor, C: Tensor, bias: Tensor | None, call: _Call
) -> tuple[Tensor, Tensor | None]:
    """Returns y [tokens, out], and z / σ if it is kept."""
    rows, W, ready = x.reshape(-1, x.shape[-1]), call.W, call.ready
    sigma = None if call.scale is None else call.scale.sigma
    if call.build:
        if ready.V is None:
            return _affine(rows, built(W, A.to(x.dtype), C, sigma), bias), None
        V = ready.V if sigma is None else ready.V.mul_(sigma.to(ready.V.dtype)[:, None])
        return _affine(rows, V, bias), None
    assert low is not None
    y = _affine(rows, W, bias) if ready.base is None else ready.base
    if ready.base is not None and bias is not None:
        y.add_(bias)
    if sigma is not None and not call.keep_straight and kernels.use(y):
        return kernels.compose_up(y[None], low[None], C, 1.0, sigma, bias)[0], None
    y.addmm_(low, C.t())
    if sigma is None:
        return y, None
    if not call.keep_straight:
        return scaled(y, bias, sigma, out=y), None
    straight = y if bias is None else y - bias
    return scaled(y, bias, sigma), straight


def _saved(ctx: Any) -> tuple[Any, ...]:
    """Returns what forward kept. torch raises if that was written to; then the cure is added."""
    try:
        saved: tuple[Any, ...] = ctx.saved_tensors
    except RuntimeError as error:
        if "inplace" not in str(error):
            raise
        raise RuntimeError(
            f"{error}\nOf an adapted layer this is its input, or with DoRA and DVoRA its output, "
            "from which m's gradient is computed. Write `y = y + z`, not `y += z`, or set "
            "WEFT_REFERENCE=1."
        ) from error
    return saved


def _unfolded(
    grad_C: Tensor, B: Tensor, d: Tensor | None, b: Tensor | None, needed: tuple[bool, bool, bool]
) -> tuple[Tensor | None, ...]:
    """The gradients of B, d and b from that of C / s, each in its own dtype."""
    grad_B = grad_d = grad_b = None
    need_B, need_d, need_b = needed
    if need_B:
        grad_B = grad_C if d is None else grad_C * d
        grad_B = (grad_B if b is None else grad_B * b[:, None]).to(B.dtype)
    if need_d or need_b:
        wide = torch.promote_types(grad_C.dtype, torch.float32)
        both = grad_C.to(wide) * B
        if d is not None and need_d:
            grad_d = (both.sum(0) if b is None else torch.mv(both.t(), b.to(wide))).to(d.dtype)
        if b is not None and need_b:
            grad_b = (both.sum(1) if d is None else torch.mv(both, d.to(wide))).to(b.dtype)
    return grad_B, grad_d, grad_b


def _wide_mm(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32 or wider: d's and b's gradients are sums over it, which a rounding would
    spoil.
    """
    if a.dtype in (torch.float32, torch.float64):
        return torch.mm(a, b)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())


def _affine(x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
    return torch.mm(x, W.t()) if bias is None else torch.addmm(bias, x, W.t())


def _row_scaled(C: Tensor, sigma: Tensor | None, s: float = 1.0) -> Tensor:
    """s σ ∘ C per row, in C's dtype."""
    if sigma is not None:
        return (C * (s * sigma)[:, None]).to(C.dtype)
    return C if s == 1.0 else C * s


def _scales_gradient(g: Tensor, W: Tensor, sigma: Tensor) -> bool:
    """σ scales g [tokens, out] rather than W [out, in] if that is the smaller."""
    return g.shape[0] <= W.shape[1] or sigma.dtype != W.dtype


def _grad_x(
    g: Tensor, W: Tensor, A: Tensor, C: Tensor | None, sigma: Tensor | None, back: bool
) -> Tensor:
    if back:
        assert C is not None
        return torch.mm(g, built(W, A.to(W.dtype), C, sigma))
    return torch.mm(g, W if sigma is None else W * sigma[:, None])


def _dot_and_scaled(
    g: Tensor,
    out: Tensor | None,
    straight: Tensor | None,
    bias: Tensor | None,
    sigma: Tensor,
    wanted: bool,
) -> tuple[Tensor, Tensor | None]:
    """Returns Σ_tokens g ∘ z [out] in float32 or wider, for z = y - bias, or for z / σ if that was
    kept; and σ ∘ g if it is wanted and costs nothing more.
    """
    kept = straight if straight is not None else out
    assert kept is not None
    y, bias = kept.view(g.shape), bias if straight is None else None
    if wanted and kernels.use(g):
        scaled_g, total = kernels.compose_grad(g, y, sigma, bias)
        return total, scaled_g
    total = _dot(g, y)
    if bias is not None:
        total = total - bias.to(total.dtype) * g.sum(0, dtype=total.dtype)
    return total, None


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Returns Σ over rows of a ∘ b, in float32 or wider.

    An einsum over the rows would be many times slower on a CPU, and a product of the whole size would
    leave the cache: so a block of sums that stays in it takes block after block of rows.
    """
    wide = torch.float64 if a.dtype == torch.float64 else torch.float32
    rows = a.shape[0] if a.is_cuda else max(64, _BLOCK // max(1, a.shape[1]))
    total = a[:rows].to(wide) * b[:rows].to(wide)
    for start in range(rows, a.shape[0], rows):
        part = slice(start, start + rows)
        total[: a[part].shape[0]].addcmul_(a[part].to(wide), b[part].to(wide))
    return total.sum(0)
