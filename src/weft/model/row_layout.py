"""Where the rows of a batch are in the input of one layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """`dim`: the dimension of a layer's positions (its input without features) that holds the rows.

    `kind`: "rows" if it is nothing but the rows; "blocks" if each row has a run of positions, as in
    [batch x tokens]; "cycles" if the rows take turns, as in [tokens x batch].
    """

    dim: int
    kind: str

    @property
    def is_first(self) -> bool:
        """Whether the first dimension is the rows, or the positions of one row after another."""
        return self.dim == 0 and self.kind != "cycles"

    def must_hold(self, positions: Sequence[int], n: int) -> bool:
        """Whether an input of other sizes than those seen, in which the n rows are at one place of
        this kind, can have them nowhere else.
        """
        return self.kind == "rows" and self.fits(positions, n) and list(positions).count(n) == 1

    def fits(self, positions: Sequence[int], n: int) -> bool:
        """Whether positions of this shape can be laid out like this, for n rows."""
        if self.dim >= len(positions):
            return False
        size = positions[self.dim]
        return size == n if self.kind == "rows" else size % n == 0

    def owned(self, positions: Sequence[int], n: int, row: int) -> Tensor:
        """Returns a mask of this shape: the positions of one row."""
        at = torch.arange(positions[self.dim])
        owner = at % n if self.kind == "cycles" else at // max(1, len(at) // n)
        shape = [1] * len(positions)
        shape[self.dim] = -1
        return (owner == row).view(shape).expand(*positions)

    def rows_first(self, t: Tensor, n: int) -> Tensor:
        """Returns t [*positions, ...] as [n, ...]."""
        before, after = t.shape[: self.dim], t.shape[self.dim + 1 :]
        if self.kind == "cycles":
            return t.reshape(*before, -1, n, *after).movedim(self.dim + 1, 0)
        return t.reshape(*before, n, -1, *after).movedim(self.dim, 0)

    def restored(self, t: Tensor, shape: Sequence[int]) -> Tensor:
        """Undoes `rows_first`: t [n, ...] in the `shape` that it had."""
        at = self.dim + 1 if self.kind == "cycles" else self.dim
        return t.movedim(0, at).reshape(*shape)


def of_single(positions: Sequence[int], n: int) -> Layout | None:
    """Returns where n rows of one token each are, in positions of this shape; None if there is
    more.
    """
    found = list(positions)
    if found.count(n) == 1 and all(size in (1, n) for size in found):
        return Layout(found.index(n), "rows")
    return None


def layouts(positions: Sequence[int], n: int) -> Iterator[Layout]:
    """Yields every layout that positions of this shape can have, for n rows."""
    for dim, size in enumerate(positions):
        if size == n:
            yield Layout(dim, "rows")
        elif size and size % n == 0:
            yield Layout(dim, "blocks")
            yield Layout(dim, "cycles")
