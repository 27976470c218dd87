"""Many adapters over one base in one batch: the updates of all rows in a few products, whatever the
number of adapters.

Rows whose adapters have tensors of their own (LoRA, DoRA, ...) use batched products over stacked A
and B. Rows that share A and B (VeRA, DVoRA) use one product each, with d, b and σ gathered per row.
Each row gets the output that its adapter alone would give.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import kernels
from .input_cache import Gathered, gathered
from .low_rank import LowRank, scaled

_LONG = 1 << 13  # numbers of one row of the output


@dataclass(frozen=True, eq=False)
class Part:
    """One adapter and its rows of the batch."""

    factors: LowRank
    rows: tuple[int, ...]
    sigma: Tensor | None = None  # [out], with its graph
    shared: bool = False  # other adapters use the same A and B


def apply(x: Tensor, y: Tensor, bias: Tensor | None, parts: Sequence[Part], n: int) -> Tensor:
    """Returns y [n, tokens, out] with each part's adapter applied to its rows of the batch.

    x [..., in] is the input and y [..., out] the base's output, both of n rows. Without gradients
    the result is written to y.
    """
    held, x = gathered(x, n), x.reshape(n, -1, x.shape[-1])
    y = y.reshape(n, -1, y.shape[-1])
    if not torch.is_grad_enabled():
        return _written(held, x, y, bias, parts)
    for bucket in _buckets(parts):
        index, some_x = held.rows(x, _rows(bucket))
        found = _adapted(held, some_x, y if index is None else y[index], bias, bucket)
        y = found if index is None else y.index_copy(0, index, found)
    return y


def _written(
    held: Gathered, x: Tensor, y: Tensor, bias: Tensor | None, parts: Sequence[Part]
) -> Tensor:
    """Adds each bucket's update to its rows, then scales every row at once, in as few passes over y
    as possible.
    """
    for bucket in _buckets(parts):
        index, some_x = held.rows(x, _rows(bucket))
        shared = bucket[0].shared
        if not shared and kernels.use(y):
            h, B = _stacked(some_x, bucket)
            some_y = y if index is None else y[index]
            which = torch.arange(len(bucket), device=y.device).repeat_interleave(
                len(some_y) // len(bucket)
            )
            kernels.compose_up(
                some_y, h.view(*some_y.shape[:2], h.shape[-1]), B, 1.0, None, None, which
            )
            y = some_y if index is None else y.index_copy_(0, index, some_y)
            continue
        if shared:
            _add(y, _rows(bucket), index, *_shared(held, some_x, bucket))
        else:
            h, B = _stacked(some_x, bucket)
            _add(
                y,
                _rows(bucket),
                index,
                torch.bmm(h, B.mT).view(*some_x.shape[:2], y.shape[-1]),
                None,
            )
    return _scaled_rows(y, bias, parts)


def _add(
    y: Tensor, rows: Sequence[int], index: Tensor | None, update: Tensor, scale: Tensor | None
) -> None:
    """Adds update ∘ scale to y[rows], for update [n, tokens, out] and scale [n, 1, out]."""
    if index is None:
        y.add_(update) if scale is None else y.addcmul_(update, scale)
    elif update[0].numel() < _LONG:
        y.index_add_(0, index, update if scale is None else update.mul_(scale))
    # row by row: one pass instead of two or three, which is faster if rows are long
    else:
        for i, row in enumerate(rows):
            y[row].add_(update[i]) if scale is None else y[row].addcmul_(update[i], scale[i])


def _scaled_rows(y: Tensor, bias: Tensor | None, parts: Sequence[Part]) -> Tensor:
    """Scales y [n, tokens, out] in place by σ [out] on the rows that have one."""
    found = [(part, sigma) for part in parts if (sigma := part.sigma) is not None]
    if not found:
        return y
    sigma = torch.ones(y.shape[0], 1, y.shape[-1], dtype=found[0][1].dtype, device=y.device)
    rows = torch.tensor([row for part, _ in found for row in part.rows], device=y.device)
    sigma[rows] = torch.stack([s for part, s in found for _ in part.rows])[:, None]
    return scaled(y, bias, sigma, out=y)


def _rows(bucket: Sequence[Part]) -> list[int]:
    """Returns the bucket's rows in the order of its parts."""
    return [row for part in bucket for row in part.rows]


def _buckets(parts: Sequence[Part]) -> Iterator[list[Part]]:
    """Yields parts that one set of products can compute: those with the same A and B, or with the
    same rank and number of rows.
    """
    found: dict[object, list[Part]] = {}
    for part in parts:
        f = part.factors
        key: object = (
            (f.A.data_ptr(), f.B.data_ptr(), f.A.shape, f.B.shape)
            if part.shared
            else (f.A.shape[0], len(part.rows), f.d is None, f.b is None)
        )
        found.setdefault(key, []).append(part)
    yield from found.values()


def _adapted(
    held: Gathered, x: Tensor, y: Tensor, bias: Tensor | None, bucket: Sequence[Part]
) -> Tensor:
    """Returns the output [n, tokens, out] of one bucket's rows, in its order, for x [n, tokens, in]
    and y [n, tokens, out].
    """
    shared = bucket[0].shared
    sigmas = _sigmas(bucket)
    if shared:
        update, scale = _shared(held, x, bucket)
        update = update * scale
    else:
        h, B = _stacked(x, bucket)
        update = torch.bmm(h, B.mT).view(y.shape)
    return y + update if sigmas is None else scaled(y + update, bias, _by_row(sigmas, bucket))


def _sigmas(bucket: Sequence[Part]) -> list[Tensor] | None:
    """Returns one σ [out] per part, ones for parts without; None if no part has one."""
    found = [part.sigma for part in bucket]
    some = next((sigma for sigma in found if sigma is not None), None)
    return (
        None
        if some is None
        else [torch.ones_like(some) if sigma is None else sigma for sigma in found]
    )


def _stacked(x: Tensor, bucket: Sequence[Part]) -> tuple[Tensor, Tensor]:
    """Returns h [k, tokens of a part, r] and B [k, out, r] of k parts."""
    k, (n, tokens, _) = len(bucket), x.shape
    A = torch.stack([part.factors.A for part in bucket]).to(x.dtype)
    B = torch.stack([part.factors.up(x.dtype) for part in bucket])
    return torch.bmm(x.reshape(k, (n // k) * tokens, x.shape[-1]), A.mT), B


def _shared(held: Gathered, x: Tensor, bucket: Sequence[Part]) -> tuple[Tensor, Tensor]:
    """Returns h Bᵀ [n, tokens, out] and b [n, 1, out] of parts that share A and B: their update is
    the product of both.
    """
    first = bucket[0].factors
    d = [part.factors.d for part in bucket if part.factors.d is not None]
    b = [part.factors.b for part in bucket if part.factors.b is not None]
    h = held.down(x, _rows(bucket), first.A) * _by_row(d, bucket).to(x.dtype)
    return torch.nn.functional.linear(h, first.B.to(x.dtype)), _by_row(b, bucket).to(x.dtype)


def _by_row(vectors: Sequence[Tensor], bucket: Sequence[Part]) -> Tensor:
    """Returns [rows of the bucket, 1, length] for one vector [length] per part."""
    repeats = [len(part.rows) for part in bucket]
    stacked = torch.stack(list(vectors))
    if len(set(repeats)) == 1:
        return (
            stacked.repeat_interleave(repeats[0], 0)[:, None]
            if repeats[0] > 1
            else stacked[:, None]
        )
    return stacked.repeat_interleave(torch.tensor(repeats, device=stacked.device), 0)[:, None]
