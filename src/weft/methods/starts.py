"""Starts of a LoRA that are taken from the weight itself: the trained A and B begin at a part of W,
and W' differs from W by how far they have moved since.

    ΔW = s (B A - B0 A0) = s ((B - B0) A + B0 (A - A0))        A0 [r, in], B0 [out, r] frozen

    "pissa"   B0 A0 = the best approximation of W / s of rank r (principal singular values and vectors,
              split evenly: B0 = U sqrt(S / s), A0 = sqrt(S / s) Vᵀ). arXiv:2404.02948
    "olora"   B0 = the first r columns of Q, A0 = the first r rows of R, W = Q R. arXiv:2406.01775

The papers put the residual W - s B0 A0 into the base and train s B A beside it. Here the base keeps
its bits, so other adapters, `detach` and `unmerge` see W; and since A - A0 and B - B0 are exactly 0
at the start, the output is the base's bit for bit, in every dtype. The gradients are those of the
papers. The price is an update of rank 2r in the forward pass; r (in + out) numbers train. Differs
from the papers with dropout, which acts on the change only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import TargetError
from ..ops.low_rank import LowRank
from .base import Shape

OF_WEIGHT = ("pissa", "olora")
_NOTHING = 1e-12  # of the largest singular value


class FromWeight:
    """What a configuration with A [r, in], B [out, r] and `init` says of such a start."""

    init: str
    r: int
    scale: float

    @property
    def starts_at_weight(self) -> bool:
        """Whether A and B start at a part of W, so that the update is their movement."""
        return self.init in OF_WEIGHT

    def start_shapes(self, out: int, in_: int) -> dict[str, Shape]:
        """Returns the shapes of A0 and B0, if there are any."""
        return {"A0": (self.r, in_), "B0": (out, self.r)} if self.starts_at_weight else {}

    def at_weight(self, W: Tensor, layer: str) -> dict[str, Tensor]:
        """Returns A and A0 [r, in], B and B0 [out, r] for W [out, in]. Raises TargetError as
        `of_weight`.
        """
        A0, B0 = of_weight(self.init, W, self.r, self.scale, layer)
        return {"A": A0, "B": B0, "A0": A0.clone(), "B0": B0.clone()}


def of_weight(init: str, W: Tensor, r: int, s: float, layer: str) -> tuple[Tensor, Tensor]:
    """Returns A0 [r, in] and B0 [out, r] in float32 (float64 if W is) for W [out, in].

    Raises TargetError if W has fewer than r directions, or numbers that are not finite.
    """
    dtype = torch.float64 if W.dtype == torch.float64 else torch.float32
    out, in_ = W.shape
    if r > min(out, in_):
        raise TargetError(
            f"init={init!r} takes r={r} directions of the weight of {layer!r} {[out, in_]}, which has "
            f"{min(out, in_)}. Lower r there."
        )
    if W.is_meta:
        return W.new_empty(r, in_, dtype=dtype), W.new_empty(out, r, dtype=dtype)
    if not bool(torch.isfinite(W).all()):
        raise TargetError(
            f"init={init!r}: the weight of {layer!r} holds NaN or infinity and cannot be decomposed."
        )
    A0, B0 = (_principal if init == "pissa" else _first_of_qr)(W.double(), r, s)
    return A0.to(dtype).contiguous(), B0.to(dtype).contiguous()


def _principal(W: Tensor, r: int, s: float) -> tuple[Tensor, Tensor]:
    """By the smaller Gram matrix, in float64: far cheaper than all singular vectors, and as exact
    for those of the largest values.
    """
    turned = W.shape[0] > W.shape[1]
    W = W.t() if turned else W
    U = torch.linalg.eigh(W @ W.t())[1].flip(1)[:, :r]
    largest = U.gather(0, U.abs().argmax(0, keepdim=True))
    U = U * largest.sign()  # of the two signs, one
    right = U.t() @ W  # S Vᵀ
    values = torch.linalg.vector_norm(right, dim=1)
    root = (values / s).sqrt()
    # A W of lower rank has no further directions: there U stays beside 0, so that both can train.
    there = values > _NOTHING * values.max()
    left = U * torch.where(there, root, 1.0)
    right = torch.where(there, 1 / (s * root), 0.0)[:, None] * right
    return (left.t(), right.t()) if turned else (right, left)


def _first_of_qr(W: Tensor, r: int, s: float) -> tuple[Tensor, Tensor]:
    Q, R = torch.linalg.qr(W)
    return R[:r], Q[:, :r]


def moved(
    A: Tensor, B: Tensor, A0: Tensor, B0: Tensor, s: float, training: bool = False
) -> LowRank:
    """Returns the factors of s (B A - B0 A0), of rank 2r: 0 exactly if nothing has moved."""
    down = torch.cat([A, A - A0], dim=-2)
    if training and A.requires_grad and not torch.is_grad_enabled():
        # In the first forward of a reentrant checkpoint it counts as trained too (dropout's mask).
        down = (
            down if torch.compiler.is_compiling() or down.is_inference() else down.requires_grad_()
        )
    up = torch.cat([B - B0, B0], dim=-1)
    return LowRank(down, up, s=s, sources=(A, B, A0, B0))
