"""A task: labelled examples in three splits, and a metric. It knows no method and no training.

A `Task` has raw examples (text or 8-bit images). The family's `encode` turns them into `Encoded`
splits for one model, with that model's tokenizer or image processor.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import WeftError

SPLITS = ("train", "validation", "test")
SPLIT_SEED = 20240917
SHARES = (0.6, 0.2, 0.2)  # train, validation, test, if one file or folder has all data


@dataclass(frozen=True)
class Split:
    """Raw examples of one split. `labels[i]` is the class number of `items[i]`, or its score in a
    regression.
    """

    items: Sequence[Any]
    labels: Sequence[float]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Sequence[int]) -> Split:
        return Split([self.items[i] for i in rows], [self.labels[i] for i in rows])


@dataclass(frozen=True)
class Task:
    """A classification task, or a regression if `classes` is empty.

    `family` is "image" or "text"; `notes` list decisions that the user did not make; `metric` is a
    name in `metrics.METRICS`.
    """

    name: str
    family: str
    classes: tuple[str, ...]
    splits: Mapping[str, Split]
    notes: tuple[str, ...] = ()
    metric: str = "accuracy"


class Encoded(Protocol):
    """One split, encoded for one model."""

    def __len__(self) -> int: ...
    def batch(self, rows: Tensor) -> dict[str, Tensor]:
        """Returns the keyword arguments of the model's forward for these rows [n],
        without labels.
        """
        ...

    def wanted(self, rows: Tensor) -> Tensor:
        """Returns the labels of these rows [n]: classes [n] int64, scores [n] float32, or tokens
        [n, length] int64 as long as the batch's rows, with -100 where there is no loss.
        """
        ...

    def fingerprint(self) -> str:
        """Returns 16 hex digits over inputs and labels, in order."""
        ...


class Labelled(Encoded, Protocol):
    """A split with a class or a score for every example."""

    @property
    def labels(self) -> Tensor:
        """The labels: [n], int64 or float32."""
        ...


@dataclass(frozen=True)
class WithLabels:
    """Base of splits with one label per row."""

    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def wanted(self, rows: Tensor) -> Tensor:
        """Returns the labels of these rows [n]."""
        return self.labels[rows]


def stratified(
    labels: Sequence[float], shares: Sequence[float], seed: int = SPLIT_SEED
) -> list[list[int]]:
    """Splits row numbers by `shares` (sum 1) within every class.

    The result depends on labels, shares and seed only. Every part has at least one row of each
    class, so a class needs as many rows as there are parts.
    """
    parts: list[list[int]] = [[] for _ in shares]
    for label in sorted(set(labels)):
        rows = [i for i, other in enumerate(labels) if other == label]
        random.Random(f"{seed}/{label}").shuffle(rows)
        sizes = [max(1, round(share * len(rows))) for share in shares[1:]]
        cut = len(rows) - sum(sizes)
        for part, size in zip(parts, [cut, *sizes], strict=True):
            part.extend(rows[:size])
            rows = rows[size:]
    return [sorted(part) for part in parts]


def cap(split: Split, most: int | None, seed: int = SPLIT_SEED) -> Split:
    """Returns at most `most` examples, drawn in proportion to the classes. Smaller splits are
    returned as they are.
    """
    if most is None or len(split) <= most:
        return split
    order: list[tuple[float, int]] = []
    for label in sorted(set(split.labels)):
        rows = [i for i, other in enumerate(split.labels) if other == label]
        random.Random(f"{seed}/cap/{label}").shuffle(rows)
        order += [((place + 0.5) / len(rows), row) for place, row in enumerate(rows)]
    return split.take(sorted(row for _, row in sorted(order)[:most]))


def capped(split: Split, most: int | None, name: str, notes: list[str]) -> Split:
    """Like `cap`; adds a note if examples are left out."""
    found = cap(split, most)
    if len(found) < len(split):
        notes.append(
            f"{name}: {len(found)} of {len(split)} examples are used (--budget {name}=N changes "
            "that)."
        )
    return found


def divide(
    where: str,
    items: Sequence[Any],
    labels: Sequence[str],
    test: tuple[Sequence[Any], Sequence[str]] | None,
) -> tuple[tuple[str, ...], dict[str, Split], list[str]]:
    """Returns classes, splits and notes from named labels. If `test` is None, part of the data is
    held out for testing.

    Raises WeftError if there is one class only, if a class is too small to be split, or if a test
    label does not occur in training.
    """
    classes = tuple(
        sorted(
            set(labels),
            key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else 0, name),
        )
    )
    if len(classes) < 2:
        raise WeftError(
            f"{where}: found {len(classes)} class{'' if len(classes) == 1 else 'es'} "
            f"{list(classes)}; "
            "a classification task needs at least two."
        )
    number = {name: i for i, name in enumerate(classes)}
    whole = Split(items, [number[name] for name in labels])
    parts = 2 if test else 3
    for name in classes:
        have = whole.labels.count(number[name])
        if have < parts:
            raise WeftError(
                f"{where}: class {name!r} has {have} example{'s' * (have != 1)}; the split into "
                f"{', '.join(SPLITS[:parts])} needs at least {parts} per class."
            )
    if test is None:
        rows = stratified(whole.labels, SHARES)
        splits = {name: whole.take(part) for name, part in zip(SPLITS, rows, strict=True)}
        held = "train, validation and test are 60, 20 and 20 % of it, by class and by a fixed seed"
    else:
        unknown = sorted(set(test[1]) - set(classes))
        if unknown:
            raise WeftError(
                f"{where}: the test data has classes {unknown} that are not in the training "
                f"data, which has {list(classes)}."
            )
        share = SHARES[1] / (SHARES[0] + SHARES[1])
        train, validation = stratified(whole.labels, (1 - share, share))
        splits = {
            "train": whole.take(train),
            "validation": whole.take(validation),
            "test": Split(test[0], [number[name] for name in test[1]]),
        }
        held = "validation is 25 % of it, by class and by a fixed seed; test is --test"
    return classes, splits, [f"{where}: {held}."]


def data_digest(labels: Tensor, *tensors: Tensor) -> str:
    """Returns 16 hex digits of SHA-256 over shapes, dtypes and bits of labels [n] and tensors
    [...].
    """
    sha = hashlib.sha256()
    for t in (labels, *tensors):
        sha.update(f"{tuple(t.shape)}{t.dtype}".encode())
        sha.update(
            t.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if t.numel() else b""
        )
    return sha.hexdigest()[:16]
