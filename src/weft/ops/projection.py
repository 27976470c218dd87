"""The product x -> dropout(x) Aᵀ with the thin factor of an update.

If A is never trained, nothing of x is kept for backward.

With A frozen, the gradient needs A alone: d x = (g A) · mask. torch would keep the mask, as large
as x (as floats on the CPU). Here the mask is a function of two random words, and backward
recomputes it from them. So of the whole low-rank branch x (A, B), only h = dropout(x) Aᵀ [..., r]
is kept, by the product with B that follows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_WORD = 2**31


def down(
    x: Tensor,
    A: Tensor,
    dropout: float = 0.0,
    training: bool = True,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Returns dropout(x) Aᵀ [..., r] for x [..., in] and A [r, in], computed in `dtype` (None: that
    of A). Dropout acts on x, as in the LoRA paper's code.
    """
    dropout = dropout if training else 0.0
    cast = A if dtype is None or A.dtype is dtype else A.to(dtype)
    if dropout and not A.requires_grad:
        return down_frozen(x, cast, dropout)
    return F.linear(F.dropout(x, dropout) if dropout else x, cast)


def down_index(
    ids: Tensor, A: Tensor, dropout: float = 0.0, padding_idx: int | None = None
) -> Tensor:
    """Returns `down` [..., r] of the one-hot vectors of ids [...], for A [r, in].

    Dropout of a one-hot vector keeps it whole (scaled) or removes it, so one draw per token is
    exact.
    """
    rows = F.embedding(ids, A.t(), padding_idx=padding_idx)
    return rows * F.dropout(rows.new_ones(*ids.shape, 1), dropout) if dropout else rows


def down_frozen(x: Tensor, A: Tensor, dropout: float) -> Tensor:
    """Returns dropout(x) Aᵀ [..., r] for x [..., in] and a frozen A [r, in], keeping nothing of x.

    The words of the mask come from the global generator of x's device, so seeds, forks and
    recomputation govern it as they govern torch's dropout.
    """
    words = torch.randint(-_WORD, _WORD, (2,), dtype=torch.int32, device=x.device)
    if torch.compiler.is_compiling():  # the compiler decides itself what to keep
        return F.linear(_dropped(x, words, dropout), A)
    out: Tensor = _Down.apply(x, A, words, dropout)  # type: ignore[no-untyped-call]
    return out


def mask(rows: int, columns: int, words: Tensor, dropout: float) -> Tensor:
    """Returns [rows, columns], True for elements that stay: a pure function of two int32 `words`
    and the indices.

    Each row and column is hashed with its word, and their exclusive or is hashed once more. The
    products wrap in int32.
    """
    row = _hash(torch.arange(rows, dtype=torch.int32, device=words.device) ^ words[0])
    column = _hash(torch.arange(columns, dtype=torch.int32, device=words.device) ^ words[1])
    return (_hash(row[:, None] ^ _hash(column + 1)[None, :]) & (_WORD - 1)) >= round(
        dropout * _WORD
    )


def _hash(x: Tensor) -> Tensor:
    """Applies a bijection of int32 in which every bit depends on every other ("lowbias32", Chris
    Wellons 2018).
    """
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * 0x7FEB352D
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * (0x846CA68B - 2**32)
    return x ^ ((x >> 16) & 0xFFFF)


def _dropped(x: Tensor, words: Tensor, dropout: float) -> Tensor:
    columns = x.shape[-1]
    kept = mask(x.numel() // max(columns, 1), columns, words, dropout).reshape(x.shape)
    return torch.where(kept, x / (1 - dropout), 0.0)


class _Down(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, words: Tensor, dropout: float) -> Tensor:
        """Returns dropout(x) Aᵀ [..., r] for x [..., in] and A [r, in], and keeps only A and two
        words.
        """
        ctx.save_for_backward(A, words)
        ctx.dropout, ctx.dtype = dropout, x.dtype
        return F.linear(_dropped(x, words, dropout), A)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None]:
        """Returns the gradient of x [..., in], (g A) under the same mask, for g [..., r]."""
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        A, words = ctx.saved_tensors
        g = gradients[0] @ A.to(gradients[0].dtype)  # under autocast the result is narrower than A
        return _dropped(g, words, ctx.dropout).to(ctx.dtype), None, None, None
