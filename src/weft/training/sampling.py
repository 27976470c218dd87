"""The random choices in training: the order of the samples, and torch's generators."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.utils.data import Sampler

GROUP = 32  # batches whose rows are sorted by length together


class EpochOrder(Sampler[int]):
    """Row numbers in an order that depends on the seed and the epoch alone."""

    def __init__(self, rows: int, seed: int) -> None:
        self.rows, self.seed, self.epoch = rows, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch whose order the next iteration has."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return iter(torch.randperm(self.rows, generator=generator).tolist())

    def __len__(self) -> int:
        return self.rows


class GroupedOrder(EpochOrder):
    """An order in which the rows of a batch are of similar `lengths`, and all of them have images
    or none. What is left of both kinds after the last whole batch is at the end.

    Batches are in a random order, and which rows are in one differs by epoch.
    """

    def __init__(
        self, lengths: Sequence[int], with_images: Sequence[bool], batch: int, seed: int
    ) -> None:
        super().__init__(len(lengths), seed)
        self.lengths, self.with_images, self.batch = lengths, with_images, batch

    def __iter__(self) -> Iterator[int]:
        mixed = list(super().__iter__())
        whole: list[list[int]] = []
        rest: list[int] = []
        for kind in (True, False):
            rows = [row for row in mixed if self.with_images[row] == kind]
            stop = len(rows) - len(rows) % self.batch
            rest += rows[stop:]
            for start in range(0, stop, GROUP * self.batch):
                group = rows[start : min(stop, start + GROUP * self.batch)]
                group.sort(key=lambda row: self.lengths[row])
                whole += [group[i : i + self.batch] for i in range(0, len(group), self.batch)]
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch + 1)
        for number in torch.randperm(len(whole), generator=generator).tolist():
            yield from whole[number]
        yield from rest


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds the global generators inside and restores them afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
