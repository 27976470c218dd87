"""A layer and its update in one autograd function, which keeps the least for backward.

    y = σ ∘ (x Wᵀ + h Cᵀ) + bias      C = s diag(b) B diag(d) [out, r]
                                      h = x Aᵀ [tokens, r]; made outside where layers share it, or x is dropped first

Kept: h and, where σ trains, y itself, which the next layer may keep too; references to W, A, B,
bias and the vectors; x if A trains. Not C, no other product of y's size. With z = y - bias and
upstream gradient g:

    grad h = (σ ∘ g) C          grad A = (grad h)ᵀ x          grad x = (σ ∘ g) W + (grad h) A
    grad C = (σ ∘ g)ᵀ h, from which grad b = s (B ∘ grad C) d, grad d = s bᵀ (B ∘ grad C), grad B = s diag(b) grad C diag(d)
    grad σ = Σ_tokens g ∘ z / σ

`build` and `back` go through W' = σ ∘ (W + C A) forwards and backwards (cost.py says when).
`keep_straight` keeps z / σ apart, for a σ that would lose it (zero, or far below the bias). There
is no second derivative.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import kernels
from .room import room

_BLOCK = 1 << 17  # numbers of a block of sums


class Adapted(torch.autograd.Function):
    """See the module's equation. x [..., in], W [out, in] -> y [..., out]; h [..., r] where others
    made it, or None; `ready` is x Wᵀ [tokens, out], or with `build` W + C A, where somebody needed
    it before, and is written to. Where m is given, σ = m / norm and the gradient of σ goes on to m.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        h: Tensor | None,
        ready: Tensor | None,
        W: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        d: Tensor | None,
        b: Tensor | None,
        sigma: Tensor | None,
        m: Tensor | None,
        norm: Tensor | None,
        s: float,
        build: bool,
        back: bool,
        keep_straight: bool,
    ) -> Tensor:
        rows, C = x.reshape(-1, x.shape[-1]), folded(B, d, b, s, x.dtype)
        need_A, need_small = ctx.needs_input_grad[5], any(ctx.needs_input_grad[5:9])
        straight, narrow = None, A.to(x.dtype)
        low = None if h is None else h.reshape(-1, h.shape[-1])
        if low is None and (need_small or not build):
            low = torch.mm(rows, narrow.t())
        if build:
            y = _affine(
                rows,
                built(W, narrow, C, sigma) if ready is None else _rows_scaled(ready, sigma),
                bias,
            )
        else:
            assert low is not None
            y = (
                _affine(rows, W, bias)
                if ready is None
                else ready
                if bias is None
                else ready.add_(bias)
            )
            if sigma is not None and not keep_straight and kernels.use(y):
                kernels.compose_up(y[None], low[None], C, 1.0, sigma, bias)
            else:
                y.addmm_(low, C.t())
                if sigma is not None:
                    straight = (y if bias is None else y - bias) if keep_straight else None
                    y = scaled(y, bias, sigma, out=None if straight is y else y)
        # Not a view: what follows may write to it (ReLU(inplace=True), +=), which torch forbids on
        # a function's views.
        out: Tensor = torch.ops.aten._unsafe_view(y, [*x.shape[:-1], W.shape[0]])
        keeps_output = any(ctx.needs_input_grad[9:11]) and not keep_straight
        ctx.save_for_backward(
            x if need_A else None,
            low if need_small else None,
            W,
            bias,
            A,
            B,
            d,
            b,
            sigma,
            norm,
            out if keeps_output else None,
            straight,
        )
        ctx.s, ctx.back, ctx.shape, ctx.h_is_theirs = s, back, x.shape, h is not None
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, h, W, bias, A, B, d, b, sigma, norm, out, straight = _saved(ctx)
        need_x, need_h, _, _, _, need_A, need_B, need_d, need_b, need_sigma, need_m = (
            ctx.needs_input_grad[:11]
        )
        g, s, back = grad.reshape(-1, grad.shape[-1]), ctx.s, ctx.back
        grad_A = grad_B = grad_d = grad_b = grad_sigma = grad_m = grad_x = scaled_g = low_g = None
        if need_sigma or need_m:
            total, scaled_g = _dot_and_scaled(g, out, straight, bias, sigma, need_x and not back)
            grad_sigma = (total if out is None else total / sigma).to(sigma.dtype)
            grad_sigma, grad_m = (None, grad_sigma / norm) if need_m else (grad_sigma, None)
        if (
            scaled_g is None
            and need_x
            and not back
            and sigma is not None
            and _scales_gradient(g, W, sigma)
        ):
            scaled_g = scaled(g, None, sigma, out=room("σ g", g.shape[0], g.shape[1], g))
        # Where σ ∘ g is there, nothing else needs the scale.
        g, sigma = (g, sigma) if scaled_g is None else (scaled_g, None)
        if need_B or need_d or need_b:
            # With thin factors h is the smaller to turn; what is multiplied with B afterwards has
            # to lie as B does.
            grad_C = torch.mm(h.t(), g).t() if d is None and b is None else torch.mm(g.t(), h)
            grad_C = _row_scaled(grad_C, sigma, s)
            grad_B, grad_d, grad_b = _unfolded(grad_C, B, d, b, (need_B, need_d, need_b))
        beside = need_x and not back and not ctx.h_is_theirs
        C = folded(B, d, b, s, g.dtype) if need_h or need_A or need_x else None
        if need_h or need_A or beside:
            assert C is not None
            low_g = torch.mm(g, _row_scaled(C, sigma))
        if need_A:
            assert low_g is not None
            grad_A = torch.mm(low_g.t(), x.reshape(-1, x.shape[-1])).to(A.dtype)
        if need_x:
            grad_x = _grad_x(g, W, A, C, sigma, back)
            if beside:
                assert low_g is not None
                grad_x.addmm_(low_g, A.to(g.dtype))
            grad_x = grad_x.view(ctx.shape)
        grad_h = (
            low_g.view(*ctx.shape[:-1], low_g.shape[1]) if need_h and low_g is not None else None
        )
        grads = (
            grad_x,
            grad_h,
            None,
            None,
            None,
            grad_A,
            grad_B,
            grad_d,
            grad_b,
            grad_sigma,
            grad_m,
        )
        return (*grads, None, None, None, None, None)


def _saved(ctx: Any) -> tuple[Any, ...]:
    """What forward kept. torch refuses it where it was written to; the likeliest is DoRA's output,
    so that is said too.
    """
    try:
        saved: tuple[Any, ...] = ctx.saved_tensors
    except RuntimeError as error:
        if "inplace" not in str(error):
            raise
        raise RuntimeError(
            f"{error}\nOf an adapted layer this is its input, or with DoRA and DVoRA its output, "
            "from which "
            "m's gradient is read. Write `y = y + z`, not `y += z`, or set WEFT_REFERENCE=1."
        ) from error
    return saved


def folded(B: Tensor, d: Tensor | None, b: Tensor | None, s: float, dtype: torch.dtype) -> Tensor:
    """C = s diag(b) B diag(d) [out, r], computed in `dtype` or wider and cast once; B itself where
    nothing is to be done.
    """
    wide = torch.promote_types(B.dtype, dtype)
    C = B.to(wide)
    if s != 1.0:
        d = C.new_full((C.shape[1],), s) if d is None else s * d.to(wide)
    if d is not None:
        C = C * d.to(wide)
    if b is not None:
        C = C * b.to(wide)[:, None] if C is B else C.mul_(b.to(wide)[:, None])
    return C.to(dtype)


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


def built(W: Tensor, A: Tensor, C: Tensor, sigma: Tensor | None) -> Tensor:
    """W' = σ ∘ (W + C A) [out, in], laid out in memory as W is, so that one fast product reads
    both. In a room (room.py).
    """
    if not W.is_contiguous() and W.t().is_contiguous():
        V = torch.addmm(W.t(), A.t(), C.t(), out=room("W'", W.shape[1], W.shape[0], W)).t()
    else:
        V = torch.addmm(W, C, A, out=room("W'", W.shape[0], W.shape[1], W))
    return _rows_scaled(V, sigma)


def _rows_scaled(V: Tensor, sigma: Tensor | None) -> Tensor:
    """σ ∘ V row by row, written to V."""
    return V if sigma is None else V.mul_(sigma.to(V.dtype)[:, None])


def scaled(y: Tensor, bias: Tensor | None, sigma: Tensor, out: Tensor | None = None) -> Tensor:
    """σ (y - bias) + bias, which is y bit for bit where σ is 1; in y's dtype, from a σ that may be
    wider; into `out`.
    """
    out = torch.empty_like(y) if out is None else out
    if sigma.dtype == y.dtype:
        return (
            torch.mul(y, sigma, out=out)
            if bias is None
            else torch.addcmul(bias - sigma * bias, y, sigma, out=out)
        )
    more = (sigma - 1).to(
        y.dtype
    )  # the difference in σ's own dtype: σ rounded to bfloat16 would be 1 for most rows
    torch.addcmul(y, y, more, out=out)
    return out if bias is None else out.sub_(more * bias)


def _affine(x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
    return torch.mm(x, W.t()) if bias is None else torch.addmm(bias, x, W.t())


def _row_scaled(C: Tensor, sigma: Tensor | None, s: float = 1.0) -> Tensor:
    """s σ ∘ C row by row, in C's dtype."""
    if sigma is not None:
        return (C * (s * sigma)[:, None]).to(C.dtype)
    return C if s == 1.0 else C * s


def _scales_gradient(g: Tensor, W: Tensor, sigma: Tensor) -> bool:
    """σ goes to g [tokens, out] rather than to W [out, in]: the smaller of the two takes it."""
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
    """Σ_tokens g ∘ z [out], in float32 or wider, of z = y - bias or of z / σ where that was kept;
    and σ ∘ g, where it is wanted and costs nothing more.
    """
    kept = straight if straight is not None else out
    assert kept is not None
    y, bias = kept.view(g.shape), bias if straight is None else None
    if wanted and kernels.use(g):
        scaled_g, total = kernels.compose_grad(g, y, sigma, bias)
        return total, scaled_g
    total = _dot(g, y)
    return total if bias is None else total - bias.to(total.dtype) * g.sum(
        0, dtype=total.dtype
    ), None


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Σ over rows of a ∘ b, in float32 or wider. An einsum over the rows would be many times slower
    on a CPU, and a product of the whole size would leave the cache: so a block of sums that stays
    in it takes block after block of rows.
    """
    wide = torch.float64 if a.dtype == torch.float64 else torch.float32
    rows = a.shape[0] if a.is_cuda else max(64, _BLOCK // max(1, a.shape[1]))
    total = a[:rows].to(wide) * b[:rows].to(wide)
    for start in range(rows, a.shape[0], rows):
        part = slice(start, start + rows)
        total[: a[part].shape[0]].addcmul_(a[part].to(wide), b[part].to(wide))
    return total.sum(0)
