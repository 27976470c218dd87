"""The norm ‖W_e + ΔW_e‖ per row of every weight of a stack, computed once per optimiser step.

One weight after the other, each from ‖W‖, W Aᵀ and A Aᵀ (norm.py), so that no second stack is ever
alive. What depends on frozen tensors only is kept: ‖W‖, and for VeRA's shared A the product W Aᵀ.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import Parameter

from .cache import Cache
from .low_rank import LowRank
from .norm import LEFT, full_precision, product, row_norm, updated_norm
from .row_scale import Sources

_NAME = "norm of the stack"


def row_norms(f: LowRank, W: Tensor, stored: Tensor, cache: Cache) -> Tensor:
    """Returns ‖W + ΔW‖ [E, out] for W [E, out, in], a view of the parameter `stored`. With its
    graph if `f.norm_grad`.
    """
    if f.norm_grad and torch.is_grad_enabled():
        with full_precision(W.device):
            return row_norm(replace(f, m=None).weight(W))
    sources = _sources(f, stored)

    def compute() -> Tensor:
        with full_precision(W.device):
            return _norms(f, W, stored, cache)

    found: Tensor = cache.get(_NAME, sources.trained, sources.frozen, compute)
    return found


def is_stale(f: LowRank, W: Tensor, stored: Tensor, cache: Cache) -> bool:
    """Whether a norm that would be used is not that of W [E, out, in]."""
    if f.m is None:
        return False
    found = cache.fresh(_NAME, _sources(f, stored).all)
    if found is None:
        return False
    with torch.no_grad(), full_precision(W.device):
        for i in range(len(W)):
            own = row_norm(replace(of_weight(f, i), m=None).weight(W[i]))
            if bool(((own - found[i]).abs() > 1e-3 * own).any()):
                return True
    return False


def of_weight(f: LowRank, i: int) -> LowRank:
    """Returns the factors of weight i of a stack."""

    def one(t: Tensor | None, dims: int) -> Tensor | None:
        return t if t is None or t.ndim == dims else t[i]

    A, B = one(f.A, 2), one(f.B, 2)
    assert A is not None and B is not None
    return replace(f, A=A, B=B, d=one(f.d, 1), b=one(f.b, 1), m=one(f.m, 1), sources=())


def _sources(f: LowRank, stored: Tensor) -> Sources:
    return Sources.of(replace(f, m=None), stored, None)


def _norms(f: LowRank, W: Tensor, stored: Tensor, cache: Cache) -> Tensor:
    base: Tensor = cache.get(
        "norm of W", (), (stored,), lambda: torch.stack([row_norm(W_e) for W_e in W])
    )
    dtype, A = base.dtype, f.A.detach().to(base.dtype)
    C = f.up(dtype).detach()
    if 2 * A.shape[-2] > W.shape[2]:  # W Aᵀ would cost as much as the sum
        return torch.stack([_of_sum(W_e, C[i], _one(A, i)) for i, W_e in enumerate(W)])
    if A.ndim == 2 and type(f.A) is not Parameter:  # kept, and at most half of W's memory
        frozen = f.A.detach()
        gram = cache.get("A A'", (), (frozen,), lambda: A @ A.t())
        known = cache.get("W A'", (), (stored, frozen), lambda: _products(W, A))
    else:
        gram, known = A @ A.mT, _products(W, A)
    ratio = torch.addcmul(C @ gram, known, torch.full((), 2.0, dtype=dtype, device=W.device))
    ratio = ratio.mul_(C).sum(2).div_(base.square()).add_(1)
    found = base * ratio.sqrt()
    if not _all_are_good(ratio, base, C, gram):
        for i, W_e in enumerate(W):
            own = gram if gram.ndim == 2 else gram[i]
            found[i] = updated_norm(W_e, base[i], _one(A, i), C[i], known[i], own)
    return found


def _one(A: Tensor, i: int) -> Tensor:
    return A if A.ndim == 2 else A[i]


def _of_sum(W: Tensor, C: Tensor, A: Tensor) -> Tensor:
    return row_norm(torch.addmm(W.to(A.dtype), C, A))


def _products(W: Tensor, A: Tensor) -> Tensor:
    """W_e Aᵀ [E, out, r] in A's dtype."""
    if W.dtype == A.dtype:
        return W @ A.mT
    return torch.stack([product(W_e, _one(A, i), A.dtype) for i, W_e in enumerate(W)])


def _all_are_good(ratio: Tensor, norm: Tensor, C: Tensor, gram: Tensor) -> bool:
    """Whether no row of any weight can have lost digits; see norm.py."""
    least, trace = norm.amin(), gram.diagonal(dim1=-2, dim2=-1).sum(-1).amax()
    most = (C.abs().amax() / least).square() * trace + 1
    return bool((ratio.amin() > LEFT * most) & (least > 1e-15))
