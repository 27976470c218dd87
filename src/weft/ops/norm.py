"""The norm of each row of a weight, and that of W + ΔW without the product ΔW."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .scratch import scratch

# Below this a row has no direction; the norm is held here so that an all-zero row stays zero and
# never turns NaN.
SMALLEST = torch.finfo(torch.float32).tiny
# Numbers of a layer's W up to which the sum W + B A is quicker than the formula without it, which
# takes more calls.
DENSE_BELOW = 1 << 16
JOINT_BELOW = (
    1 << 22
)  # numbers of an input that is worth copying to read W once for output and norm
_BLOCK = 1 << 22  # numbers of W that are held in a wider dtype at one time
# A row of which less than this share is left of the squared lengths that it is the sum of has lost
# digits to cancellation.
_LEFT = 0.05


def at_least_float32(t: Tensor) -> Tensor:
    """Returns t [...] in float32, or t itself if it is float64: the dtypes of an effective weight."""
    return t if t.dtype == torch.float64 else t.float()


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Switches autocast off on this device: it would round the norm of a weight to bfloat16."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        yield
        return
    with torch.autocast(device.type, enabled=False):
        yield


def row_norm(V: Tensor) -> Tensor:
    """Returns ‖V‖ per row [out] for V [out, in], in float32 or wider, at least the smallest normal."""
    if V.is_meta:  # vector_norm is slow on the meta device
        return V.new_empty(V.shape[0], dtype=torch.promote_types(V.dtype, torch.float32))
    norm: Tensor = torch.linalg.vector_norm(at_least_float32(V), dim=1)
    return norm.clamp_min(SMALLEST)


def product(W: Tensor, A: Tensor, dtype: torch.dtype) -> Tensor:
    """W Aᵀ [out, r] in `dtype`, for W [out, in] and A [r, in], without a wide copy of the whole of
    W.
    """
    A = A.to(dtype).t()
    if W.dtype == dtype:
        return W @ A
    rows = max(1, _BLOCK // max(1, W.shape[1]))
    return torch.cat([part.to(dtype) @ A for part in torch.split(W, rows)])


def can_join(x: Tensor, W: Tensor, dtype: torch.dtype) -> bool:
    """Returns True if `joint_product` gives W Aᵀ in `dtype` and is faster than reading W twice.

    x is [..., in] and W is [out, in].
    """
    return x.dtype == W.dtype == dtype and 0 < x.numel() <= JOINT_BELOW


def joint_product(x: Tensor, W: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """x Wᵀ [tokens, out] and W Aᵀ [out, r] in one product, for x [..., in]: so W is read once."""
    rows = x.reshape(-1, x.shape[-1])
    joined = torch.cat(
        [rows, A.to(x.dtype)],
        out=scratch("x and A", rows.shape[0] + A.shape[0], rows.shape[1], rows),
    )
    both = joined @ W.t()
    return both[: rows.shape[0]], both[rows.shape[0] :].t()


def without_unit(norm: Tensor) -> Tensor:
    """The rows [k] whose ‖W‖ is no good unit to measure a change in: zero, or so small or large
    that its square is lost.
    """
    return ((norm < 1e-15) | (norm > 1e15)).nonzero()[:, 0]


def updated_norm(
    W: Tensor,
    norm: Tensor,
    A: Tensor,
    C: Tensor,
    known: Tensor | None = None,
    gram: Tensor | None = None,
    odd: Tensor | None = None,
) -> Tensor:
    """`row_norm(W + C A)` [out] for W [out, in], A [r, in], C [out, r] and norm = row_norm(W),
    without the product C A.

        ‖W + CA‖² = ‖W‖² + 2 Σ (W Aᵀ ∘ C) + Σ (C (A Aᵀ) ∘ C)      row by row

    `known` is W Aᵀ [out, r], `gram` A Aᵀ [r, r] and `odd` without_unit(norm), where they are known.
    In norm's dtype. It is computed as ‖W‖ sqrt(1 + ...), so that C = 0 gives ‖W‖ bit for bit; rows
    in which much cancels are computed from the sum.
    """
    dtype = norm.dtype
    A, C = A.to(dtype), C.to(dtype)
    known = product(W, A, dtype) if known is None else known
    gram = A @ A.t() if gram is None else gram
    square = norm.square()
    ratio = torch.addmm(known, C, gram, beta=2).mul_(C).sum(1).div_(square).add_(1)
    found: Tensor = norm * ratio.sqrt()
    rows = without_unit(norm) if odd is None else odd
    if not _all_are_good(ratio, norm, C, gram):
        parts = (
            torch.mv(C.square(), gram.diagonal()).div_(square).add_(1)
        )  # of W and of each rank's share of C A
        bad = ~(ratio > parts.mul_(_LEFT))  # True for what is not a number or has overflowed
        rows = torch.cat([rows, bad.nonzero()[:, 0]])
    if rows.numel():
        found[rows] = row_norm(torch.addmm(W[rows].to(dtype), C[rows], A))
    return found


def _all_are_good(ratio: Tensor, norm: Tensor, C: Tensor, gram: Tensor) -> bool:
    """No row can have lost digits, by a bound of few numbers: what the ranks add is max(C)² trace(A
    Aᵀ) at most.
    """
    if not C.numel():
        return False
    least = norm.min()
    most = (C.abs().max() / least).square() * gram.diagonal().sum() + 1
    return bool(
        (ratio.min() > _LEFT * most) & (least > 1e-15)
    )  # False where one of them is not a number
