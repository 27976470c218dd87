"""Where virtual tokens stand among the real ones of one forward: columns, masks and position
ids.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Frame:
    """One forward with virtual tokens: `before` of them in front, `after` of them behind column
    `end` of the input.

    `end` is one number, or one a row [rows, 1]. `length` is the input's. `answers`: the last one
    behind the prompt predicts what comes next, as in a decoder; in an encoder every token answers
    for itself.
    """

    before: int
    after: int
    end: int | Tensor
    length: int
    device: torch.device
    answers: bool = True

    @property
    def total(self) -> int:
        return self.before + self.length + self.after

    def real(self) -> Tensor:
        """[1 or rows, length]: the column of every real token."""
        t = torch.arange(self.length, device=self.device)[None]
        return t + self.before + self.after * (t >= self.end).long()

    def behind(self) -> Tensor:
        """[1 or rows, after]: the columns behind the prompt."""
        j = torch.arange(self.after, device=self.device)[None]
        return j + self.before + self.end

    def virtual(self) -> Tensor:
        """[1 or rows, before + after]: all columns of virtual tokens."""
        first = torch.arange(self.before, device=self.device)[None]
        behind = self.behind()
        return torch.cat([first.expand(behind.shape[0], -1), behind], dim=1)

    def seen(self) -> Tensor:
        """[1 or rows, length]: the column whose state answers for a real token; for the prompt's
        last token, the last one behind the prompt, since that is what comes before the next token.
        """
        t = torch.arange(self.length, device=self.device)[None]
        real = self.real()
        return (
            torch.where(t == self.end - 1, real + self.after, real)
            if self.after and self.answers
            else real
        )

    def extend(self, x: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """x [rows, length, ...] with the virtual tokens' values, [before, ...] and [after, ...] or
        one a row, in place.
        """
        rows = x.shape[0]
        parts = [
            first if first.dim() == x.dim() else first[None].expand(rows, *first.shape)
            for first in (before, after)
        ]
        virtual, real = self.virtual(), self.real()
        places = torch.cat(
            [
                virtual[:, : self.before].expand(real.shape[0], -1),
                real,
                virtual[:, self.before :].expand(real.shape[0], -1),
            ],
            dim=1,
        )
        order = places.argsort(dim=1).expand(rows, -1)
        return take(torch.cat([parts[0].to(x.dtype), x, parts[1].to(x.dtype)], dim=1), order)

    def mask(self, mask: Tensor) -> Tensor:
        return self.extend(mask, mask.new_ones(self.before), mask.new_ones(self.after))

    def positions(self, given: Tensor, mask: Tensor | None) -> Tensor:
        """Position ids [1 or rows, length] of the real tokens, with those of the virtual ones among
        them. Behind the prompt they go on from the last real token before `end`, or, where there is
        none, lead up to the first one behind it.
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

    def of(self, length: int) -> Frame:
        """The same virtual tokens in an input of another length."""
        return Frame(self.before, self.after, self.end, length, self.device, self.answers)


def take(x: Tensor, columns: Tensor) -> Tensor:
    """x [rows, n, ...] at columns [rows, m]."""
    index = columns.reshape(*columns.shape, *(1 for _ in x.shape[2:])).expand(-1, -1, *x.shape[2:])
    return x.gather(1, index)
