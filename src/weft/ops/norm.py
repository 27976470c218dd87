"""The norm of each row of a weight, and that of W + ΔW without the product ΔW."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from .scratch import scratch

# The smallest norm: so an all-zero row, which has no direction, stays zero instead of NaN.
SMALLEST = torch.finfo(torch.float32).tiny
# Numbers of W up to which the sum W + B A is faster than the formula without it, which takes more
# calls.
DENSE_BELOW = 1 << 16
JOINT_BELOW = (
    1 << 22
)  # numbers of an input up to which a copy pays, so that W is read once for output and norm
_BLOCK = 1 << 22  # numbers of W that are converted to a wider dtype at a time
# If less than this share of the summed squared lengths remains in a row, cancellation cost digits.
LEFT = 0.05


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
    """Returns ‖V‖ per row [..., out] for V [..., out, in], in float32 or wider, at least the
    smallest normal number.
    """
    if V.is_meta:  # vector_norm is slow on the meta device
        return V.new_empty(V.shape[:-1], dtype=torch.promote_types(V.dtype, torch.float32))
    norm: Tensor = torch.linalg.vector_norm(at_least_float32(V), dim=-1)
    return norm.clamp_min(SMALLEST) if norm.requires_grad else norm.clamp_min_(SMALLEST)


def product(W: Tensor, A: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns W Aᵀ [out, r] in `dtype`, for W [out, in] and A [r, in], without a cast of the whole
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
    """Returns x Wᵀ [tokens, out] and W Aᵀ [out, r] from one product that reads W once, for x [...,
    in].
    """
    rows = x.reshape(-1, x.shape[-1])
    joined = torch.cat(
        [rows, A.to(x.dtype)],
        out=scratch("x and A", rows.shape[0] + A.shape[0], rows.shape[1], rows),
    )
    both = joined @ W.t()
    return both[: rows.shape[0]], both[rows.shape[0] :].t()


def without_unit(norm: Tensor) -> Tensor:
    """Returns the indices [k] of rows whose ‖W‖ [out] cannot be a unit for changes: zero, or so
    small or large that its square is inaccurate.
    """
    return ((norm < 1e-15) | (norm > 1e15)).nonzero()[:, 0]


class Rows(Protocol):
    """W [out, in] by rows, as `updated_norm` reads it: a tensor, or one that is unpacked when
    asked.
    """

    def __getitem__(self, rows: Tensor) -> Tensor: ...


def updated_norm(
    W: Rows,
    norm: Tensor,
    A: Tensor,
    C: Tensor,
    known: Tensor | None = None,
    gram: Tensor | None = None,
    odd: Tensor | None = None,
) -> Tensor:
    """Returns `row_norm(W + C A)` [out] without the product C A, in norm's dtype.

    W is [out, in], A [r, in], C [out, r] and norm = row_norm(W) [out].

        ‖W + CA‖² = ‖W‖² + 2 Σ (W Aᵀ ∘ C) + Σ (C (A Aᵀ) ∘ C)      row by row

    Optional inputs save work: `known` is W Aᵀ [out, r], `gram` A Aᵀ [r, r] and `odd`
    without_unit(norm). The result is computed as ‖W‖ sqrt(1 + ...), so C = 0 gives ‖W‖ bit for bit;
    rows with much cancellation are computed from the sum.
    """
    dtype = norm.dtype
    A, C = A.to(dtype), C.to(dtype)
    if known is None:
        assert isinstance(W, Tensor)
        known = product(W, A, dtype)
    gram = A @ A.t() if gram is None else gram
    square = norm.square()
    ratio = torch.addmm(known, C, gram, beta=2).mul_(C).sum(1).div_(square).add_(1)
    found: Tensor = norm * ratio.sqrt()
    rows = without_unit(norm) if odd is None else odd
    if not _all_are_good(ratio, norm, C, gram):
        parts = (
            torch.mv(C.square(), gram.diagonal()).div_(square).add_(1)
        )  # of W and of each rank's share of C A
        bad = ~(ratio > parts.mul_(LEFT))  # True also for NaN and overflow
        rows = torch.cat([rows, bad.nonzero()[:, 0]])
    if rows.numel():
        found[rows] = row_norm(torch.addmm(W[rows].to(dtype), C[rows], A))
    return found


def _all_are_good(ratio: Tensor, norm: Tensor, C: Tensor, gram: Tensor) -> bool:
    """Returns True if no row can have lost digits, by a cheap bound: the ranks add at most max(C)²
    trace(A Aᵀ).
    """
    if not C.numel():
        return False
    least = norm.min()
    most = (C.abs().max() / least).square() * gram.diagonal().sum() + 1
    return bool(
        (ratio.min() > LEFT * most) & (least > 1e-15)
    )  # False if one of them is not a number
