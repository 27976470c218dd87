"""The low-rank product x -> x Aᵀ Bᵀ, which never builds the [out, in] matrix."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import frozen


def down(
    x: Tensor,
    A: Tensor,
    dropout: float = 0.0,
    training: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """x [..., in], A [r, in] -> x Aᵀ [..., r], with A in `dtype` (None: as it is); dropout acts on
    x, as in the LoRA paper's code.

    Where A is frozen, nothing of x is kept for backward (frozen.py).
    """
    cast = A if dtype is None else A.to(dtype)
    if not A.requires_grad:
        return frozen.down(x, cast, dropout, training)
    if dropout and training:
        x = F.dropout(x, dropout)
    return F.linear(x, cast)


def down_index(
    ids: Tensor,
    A: Tensor,
    dropout: float = 0.0,
    training: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """The same for one-hot rows: ids [...] into A [r, in] -> [..., r].

    Dropout of a one-hot vector leaves it whole (scaled) or removes it, so one draw a token is
    exact.
    """
    rows = F.embedding(ids, A.t(), padding_idx=padding_idx)
    if dropout and training:
        keep = F.dropout(rows.new_ones(*ids.shape, 1), dropout)
        rows = rows * keep
    return rows


def up(h: Tensor, B: Tensor, scale: float = 1.0) -> Tensor:
    """h [..., r], B [out, r] -> scale · h Bᵀ [..., out]; the scale acts on the small side."""
    return F.linear(h if scale == 1.0 else h * scale, B)
