"""A layer and its update in torch's own operations: as few as there can be, for small work.

    y = W x + bias,    y += s (h ∘ d) Bᵀ ∘ b,    y = σ (y - bias) + bias        h = x Aᵀ

`adapted` takes h and y as they come and works under autocast, torch.compile, torch.func and with tensor
subclasses. `evaluate` and `train` compute the whole layer for plain tensors of one dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .low_rank import LowRank, row_scale, scaled
from .row_scale import RowScale


def adapted(
    y: Tensor, h: Tensor, bias: Tensor | None, f: LowRank, norm: Tensor | None = None
) -> Tensor:
    """Returns the layer's output [..., out] from its own, y = W x + bias [..., out], and h = x Aᵀ [..., r].

    `norm` is ‖W + ΔW‖ [out] if f has an m.
    """
    y = _updated(y, h.to(y.dtype), f)
    if f.m is None or norm is None:
        return y
    return scaled(y, bias, row_scale(f.m, norm))


def evaluate(
    x: Tensor, W: Tensor, bias: Tensor | None, f: LowRank, scale: RowScale | None = None
) -> Tensor:
    """Returns y [..., out] for x [..., in], W [out, in] and bias [out], without a graph."""
    y, h = F.linear(x, W, bias), F.linear(x, f.A)
    rows = y
    if y.dim() != 2:
        rows, h = y.view(-1, y.shape[-1]), h.view(-1, h.shape[-1])
    if f.d is not None:
        h.mul_(f.d)
    if f.b is None:
        rows.addmm_(h, f.B.t(), alpha=f.s)
    else:
        rows.addcmul_(F.linear(h, f.B), f.b, value=f.s)
    if scale is not None:
        if scale.shift is None:
            rows.mul_(scale.sigma)
        else:
            torch.addcmul(scale.shift, rows, scale.sigma, out=rows)
    return y


def train(
    x: Tensor, W: Tensor, bias: Tensor | None, f: LowRank, norm: Tensor | None = None
) -> Tensor:
    """Returns y [..., out] with its graph, for x [..., in], W [out, in], bias [out] and norm [out]."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    y, h = F.linear(rows, W, bias), F.linear(rows, f.A)
    if f.d is None and f.b is None:
        y = torch.addmm(y, h, f.B.t(), alpha=f.s)
    else:
        y = _updated(y, h, f)
    if f.m is not None and norm is not None:
        y = scaled(y, bias, f.m / norm)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], W.shape[0])


def _updated(y: Tensor, h: Tensor, f: LowRank) -> Tensor:
    """y + s (h ∘ d) Bᵀ ∘ b, in y's dtype."""
    h = h if f.d is None else h * f.d.to(y.dtype)
    up = F.linear(h, f.B.to(y.dtype)).to(y.dtype)
    if f.b is None:
        return torch.add(y, up, alpha=f.s)
    return torch.addcmul(y, up, f.b.to(y.dtype), value=f.s)
