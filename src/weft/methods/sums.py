"""A weighted sum of low-rank changes of one weight, as one LoRA or DoRA.

    U = W + Σ w (W' - W)        W' = σ ∘ (W + ΔW), σ = 1 without m

Without m, U - W = Σ w ΔW: the factors side by side, and the ranks add. With m, row by row,

    U = c W + Σ w σ ΔW          c = 1 + Σ w (σ - 1)

which is DoRA again: V = W + Σ (w σ / c) ΔW and m = c ‖V‖ give m V / ‖V‖ = U. So both sums are
exact; what remains is the rounding of the factors, which `distance` measures.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops.low_rank import LowRank, row_scale
from ..ops.norm import row_norm
from .dora import DoRA
from .lora import LoRA

Terms = Sequence[tuple[float, LowRank]]  # strength and factors


def method_of(magnitude: bool) -> type[LoRA]:
    """Returns the method that a sum is, with or without m."""
    return DoRA if magnitude else LoRA


def summed(W: Tensor, terms: Terms, magnitude: bool) -> LowRank:
    """Returns the factors of U for W [out, in] in float64, with m [out] if `magnitude`.

    Their rank is the sum of the ranks, or min(out, in) if that is smaller. A row with c = 0 is
    wrong unless U is zero there.
    """
    W = W.detach().double()
    downs, ups, c = [], [], torch.ones_like(W[:, 0])
    for strength, f in terms:
        A, up = f.A.detach().double(), strength * f.up(torch.float64).detach()
        sigma = _sigma(W, f)
        if sigma is not None:
            up, c = sigma[:, None] * up, c + strength * (sigma - 1)
        downs.append(A)
        ups.append(up)
    A, B = torch.cat(downs), torch.cat(ups, dim=1)
    if magnitude:
        B = B / torch.where(c == 0, 1.0, c)[:, None]
    if len(A) > min(W.shape):
        A, B = _smaller(B @ A)
    return LowRank(A, B, m=c * row_norm(W + B @ A) if magnitude else None)


def distance(W: Tensor, terms: Terms, found: LowRank) -> float:
    """Returns the largest error of a row of `found`, relative to the length of W's row and of the
    terms' changes of it.
    """
    W = W.detach().double()
    wanted, size = W.clone(), torch.linalg.vector_norm(W, dim=1)
    for strength, f in terms:
        delta = f.delta(torch.float64).detach()
        sigma = _sigma(W, f)
        change = delta if sigma is None else sigma[:, None] * (W + delta) - W
        wanted += strength * change
        size += abs(strength) * torch.linalg.vector_norm(change, dim=1)
    gap = torch.linalg.vector_norm(found.weight(W).detach() - wanted, dim=1)
    return float((gap / size.clamp_min(torch.finfo(torch.float64).tiny)).max())


def _sigma(W: Tensor, f: LowRank) -> Tensor | None:
    """σ [out] in float64, or None without m."""
    if f.m is None:
        return None
    return row_scale(f.m.detach(), row_norm(W + f.delta(torch.float64).detach()))


def _smaller(delta: Tensor) -> tuple[Tensor, Tensor]:
    """A and B of rank min(out, in) for a change [out, in]: one of them is the identity."""
    out, in_ = delta.shape
    eye = torch.eye(min(out, in_), dtype=delta.dtype, device=delta.device)
    return (delta, eye) if out < in_ else (eye, delta)
