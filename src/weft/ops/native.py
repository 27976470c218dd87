"""A layer and its update in torch's own operations: as few as there can be, for small work.

    y = W x + bias,    y += s (h ∘ d) Bᵀ ∘ b,    y = σ (y - bias) + bias        h = x Aᵀ

For the smallest layers it is cheaper to build V = W + ΔW in every call: `built` and `of_built`.

`adapted` takes h and y as they come and works under autocast, torch.compile, torch.func and with
tensor subclasses. `forward_inference` and `forward_training` compute the whole layer for plain
tensors of one dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .low_rank import LowRank, added, row_scale, scaled
from .norm import row_norm
from .row_scale import RowScale

FOLDED = 1 << 12  # numbers of B up to which σ, b and d are folded into a copy that is kept


def adapted(
    y: Tensor, h: Tensor, bias: Tensor | None, f: LowRank, norm: Tensor | None = None
) -> Tensor:
    """Returns the layer's output [..., out] from its own, y = W x + bias [..., out], and h = x Aᵀ
    [..., r].

    `norm` is ‖W + ΔW‖ [out] if f has an m.
    """
    y = _updated(y, h.to(y.dtype), f)
    if f.m is None or norm is None:
        return y
    return scaled(y, bias, row_scale(f.m, norm))


def change(
    y: Tensor, h: Tensor, bias: Tensor | None, f: LowRank, norm: Tensor | None = None
) -> Tensor:
    """Returns `adapted` - y [..., out], without the cancellation of that difference:

    Δ = s (h ∘ d) Bᵀ ∘ b without m, else σ Δ + (σ - 1) (y - bias), in σ's dtype.
    """
    update = _update(y, h.to(y.dtype), f)
    if f.m is None or norm is None:
        return update
    sigma = row_scale(f.m, norm)
    return sigma * update + (sigma - 1) * (y if bias is None else y - bias)


def forward_inference(
    x: Tensor, W: Tensor, bias: Tensor | None, f: LowRank, scale: RowScale | None = None
) -> Tensor:
    """Returns y [..., out] for x [..., in], W [out, in] and bias [out], without a graph."""
    y, h = F.linear(x, W, bias), F.linear(x, f.A)
    rows = y
    if y.dim() != 2:
        rows, h = y.view(-1, y.shape[-1]), h.view(-1, h.shape[-1])
    if scale is not None and f.b is not None and f.B.numel() <= FOLDED:
        _scale_rows(rows, scale)
        rows.addmm_(h, scale.folded(f).t())
        return y
    if f.d is not None:
        h.mul_(f.d)
    if f.b is None:
        rows.addmm_(h, f.B.t(), alpha=f.s)
    else:
        rows.addcmul_(F.linear(h, f.B), f.b, value=f.s)
    if scale is not None:
        _scale_rows(rows, scale)
    return y


def _scale_rows(rows: Tensor, scale: RowScale) -> None:
    """rows [tokens, out] <- σ (rows - bias) + bias."""
    if scale.shift is None:
        rows.mul_(scale.sigma)
    else:
        torch.addcmul(scale.shift, rows, scale.sigma, out=rows)


def forward_training(
    x: Tensor,
    W: Tensor,
    bias: Tensor | None,
    f: LowRank,
    norm: Tensor | None = None,
    h: Tensor | None = None,
) -> Tensor:
    """Returns y [..., out] with its graph, for x [..., in], W [out, in], bias [out] and norm [out].

    `h` is x Aᵀ [..., r] if it is there already.
    """
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    y = F.linear(rows, W, bias)
    h = F.linear(rows, f.A) if h is None else h.reshape(-1, h.shape[-1])
    if f.d is None and f.b is None:
        y = torch.addmm(y, h, f.B.t(), alpha=f.s)
    else:
        y = _updated(y, h, f)
    if f.m is not None and norm is not None:
        y = scaled(y, bias, f.m / norm)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], W.shape[0])


def built(W: Tensor, f: LowRank) -> Tensor:
    """Returns V = W + ΔW [out, in] with its graph, in W's dtype, for W [out, in]."""
    if f.d is None and f.b is None:
        return added(W, f.B, f.A, f.s)
    if f.d is not None and f.b is not None:
        outer = torch.addr(f.B, f.b, f.d, beta=0, alpha=f.s)  # two products backwards, and no sums
        return added(W, f.B * outer, f.A)
    return added(W, f.up(W.dtype), f.A)


def of_built(x: Tensor, V: Tensor, bias: Tensor | None, m: Tensor | None) -> Tensor:
    """Returns y [..., out] = (σ ∘ V) x + bias for x [..., in], V [out, in], bias [out] and m [out].

    The norm is that of V at hand, which costs no more than to see whether a kept one is still true.
    Without gradients V is written to.
    """
    if m is None:
        return F.linear(x, V, bias)
    if torch.is_grad_enabled():
        sigma = row_scale(m, row_norm(V.detach()))
        return F.linear(x, V * sigma.unsqueeze(1), bias)
    return F.linear(x, V.mul_(row_scale(m, row_norm(V)).unsqueeze(1)), bias)


def _update(y: Tensor, h: Tensor, f: LowRank) -> Tensor:
    """s (h ∘ d) Bᵀ ∘ b, in y's dtype."""
    h = h if f.d is None else h * f.d.to(y.dtype)
    up = F.linear(h, f.B.to(y.dtype)).to(y.dtype)
    up = up if f.s == 1.0 else f.s * up
    return up if f.b is None else up * f.b.to(y.dtype)


def _updated(y: Tensor, h: Tensor, f: LowRank) -> Tensor:
    """y + s (h ∘ d) Bᵀ ∘ b, in y's dtype."""
    h = h if f.d is None else h * f.d.to(y.dtype)
    up = F.linear(h, f.B.to(y.dtype)).to(y.dtype)
    if f.b is None:
        return torch.add(y, up, alpha=f.s)
    return torch.addcmul(y, up, f.b.to(y.dtype), value=f.s)
