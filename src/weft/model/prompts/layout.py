"""The columns, masks and position ids of virtual tokens among the real ones of one forward."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class TokenLayout:
    """One forward with virtual tokens: `before` of them in front, `after` of them after column
    `end` of the input.

    `end` is one number, or one per row [rows, 1]. `length` is the input's. `answers`: the last one
    after the prompt predicts the next token, as in a decoder; in an encoder every token answers for
    itself.
    """

    before: int
    after: int
    end: int | Tensor
    length: int
    device: torch.device
    answers: bool = True

    @property
    def total(self) -> int:
        """The number of columns, real and virtual."""
        return self.before + self.length + self.after

    def real(self) -> Tensor:
        """Returns [1 or rows, length]: the column of every real token."""
        t = torch.arange(self.length, device=self.device)[None]
        return t + self.before + self.after * (t >= self.end).long()

    def behind(self) -> Tensor:
        """Returns [1 or rows, after]: the columns after the prompt."""
        j = torch.arange(self.after, device=self.device)[None]
        return j + self.before + self.end

    def virtual(self) -> Tensor:
        """Returns [1 or rows, before + after]: all columns of virtual tokens."""
        first = torch.arange(self.before, device=self.device)[None]
        behind = self.behind()
        return torch.cat([first.expand(behind.shape[0], -1), behind], dim=1)

    def outputs(self) -> Tensor:
        """Returns [1 or rows, length]: the column whose state answers for each real token. For the
        prompt's last token it is the last one after the prompt, which precedes the next token.
        """
        t = torch.arange(self.length, device=self.device)[None]
        real = self.real()
        return (
            torch.where(t == self.end - 1, real + self.after, real)
            if self.after and self.answers
            else real
        )

    def extend(self, x: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """Returns x [rows, length, ...] with the values of virtual tokens inserted: [before, ...]
        and [after, ...], or one of them per row; the result is [rows, total, ...].
        """
        rows = x.shape[0]
        parts = [
            first if first.dim() == x.dim() else first[None].expand(rows, *first.shape)
            for first in (before, after)
        ]
        virtual, real = self.virtual(), self.real()
        columns = torch.cat(
            [
                virtual[:, : self.before].expand(real.shape[0], -1),
                real,
                virtual[:, self.before :].expand(real.shape[0], -1),
            ],
            dim=1,
        )
        order = columns.argsort(dim=1).expand(rows, -1)
        return take(torch.cat([parts[0].to(x.dtype), x, parts[1].to(x.dtype)], dim=1), order)

    def mask(self, mask: Tensor) -> Tensor:
        """Returns a mask [rows, length] as [rows, total], with ones for virtual tokens."""
        return self.extend(mask, mask.new_ones(self.before), mask.new_ones(self.after))

    def positions(self, given: Tensor, mask: Tensor | None) -> Tensor:
        """Returns position ids [1 or rows, length] with those of the virtual tokens inserted. After
        the prompt they continue from the last real token before `end`, or, if there is none, lead
        up to the first one after it.
        """
        t, end = (
            torch.arange(self.length, device=self.device)[None],
            torch.as_tensor(self.end, device=self.device),
        )
        given = given.expand(max(given.shape[0], end.shape[0] if end.dim() else 1), -1)
        before = (t < end) & (
            mask.bool() if mask is not None else torch.ones_like(t, dtype=torch.bool)
        )
        next_ = end.reshape(-1, 1).expand(given.shape[0], -1).clamp(max=self.length - 1)
        last = given.masked_fill(~before, -1).amax(dim=1, keepdim=True)
        start = torch.where(before.any(dim=1, keepdim=True), last, given.gather(1, next_) - 1)
        behind = start + self.before + 1 + torch.arange(self.after, device=self.device)[None]
        first = torch.arange(self.before, device=self.device)[None].expand(behind.shape[0], -1)
        moved = given + self.before + self.after * (t >= end).long()
        return self.extend(moved.expand(behind.shape[0], -1), first, behind)

    def with_length(self, length: int) -> TokenLayout:
        """Returns the layout of the same virtual tokens in an input of another length."""
        return TokenLayout(self.before, self.after, self.end, length, self.device, self.answers)


def take(x: Tensor, columns: Tensor) -> Tensor:
    """Returns x [rows, n, ...] at columns [rows, m]: [rows, m, ...]."""
    index = columns.reshape(*columns.shape, *(1 for _ in x.shape[2:])).expand(-1, -1, *x.shape[2:])
    return x.gather(1, index)
