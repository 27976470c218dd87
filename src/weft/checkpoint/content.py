"""What a checkpoint says, whoever wrote it, and what became of it on loading."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..methods.base import Shape
from ..model.adapter import Adapter

SHOWN = 12  # problems in an error's text


@dataclass
class StoredSite:
    """One adapted layer in a file. `kind` and `shape` (out, in) are None where the file does not
    say them.
    """

    rule: Any
    tensors: dict[str, Tensor] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)  # tensor -> key in the file
    kind: str | None = None
    shape: tuple[int, int] | None = None
    reached: str | None = None  # what training has decided of it, for rules that say so


@dataclass
class Stored:
    """A checkpoint, read and not yet matched against a model.

    `selected` are base tensors trained as copies. `repeated` are base tensors that the file merely
    repeats. `matrices` are VeRA's A and B where the file holds them. `problems` are what is wrong
    within the file.
    """

    config: Any
    writer: str
    base: dict[str, Any] = field(default_factory=dict)
    sites: dict[str, StoredSite] = field(default_factory=dict)
    selected: dict[str, Tensor] = field(default_factory=dict)
    repeated: dict[str, Tensor] = field(default_factory=dict)
    matrices: tuple[Tensor, Tensor] | None = None
    checksums: dict[str, str] = field(
        default_factory=dict
    )  # of matrices that are redrawn from a seed, by share key
    peft_reads_it: bool = True
    in_order: bool = (
        False  # the sites go by their order, and the model tells which modules they are
    )
    problems: list[str] = field(default_factory=list)
    mapped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def numbers(self) -> int:
        """Trained numbers in the file."""
        held = [t for site in self.sites.values() for t in site.tensors.values()] + list(
            self.selected.values()
        )
        return sum(t.numel() for t in held)


@dataclass
class LoadReport:
    """What `load` did: problems (empty when strict), names that were mapped, and notes."""

    adapter: Adapter
    problems: list[str]
    mapped: list[str]
    notes: list[str]

    @property
    def ok(self) -> bool:
        """Every tensor of the file landed and every tensor of the adapter was filled."""
        return not self.problems

    def __str__(self) -> str:
        head = (
            f"loaded {self.adapter.name!r}: {self.adapter.num_parameters:,} numbers, "
            f"{len(self.problems)} problem{'' if len(self.problems) == 1 else 's'}"
        )
        return "\n".join(
            [
                head,
                *(f"  problem: {p}" for p in self.problems),
                *(f"  mapped: {m}" for m in self.mapped),
                *(f"  note: {n}" for n in self.notes),
            ]
        )


def take(
    tensors: dict[str, Tensor], key: str, shape: Shape | None, what: str, problems: list[str]
) -> Tensor | None:
    """Remove `key` from `tensors` and return it; None, with a problem, where it is missing or
    unfit.
    """
    found = tensors.pop(key, None)
    fault = None if found is None else fault_of(found, shape)
    if found is None:
        problems.append(
            f"missing: {key!r} ({what}){nearest('in the file', key, tensors, problems)}"
        )
    elif fault is not None:
        problems.append(f"{key!r} ({what}): {fault}")
    return found if fault is None else None


def fault_of(t: Tensor, shape: Shape | None) -> str | None:
    """Why a tensor from a file cannot be used, or None. Without a `shape`, any that has elements
    will do.
    """
    if t.numel() == 0 and shape != tuple(t.shape):
        return f"it is empty, shape {list(t.shape)}; a sharded model must gather its tensors before saving"
    if shape is not None and tuple(t.shape) != tuple(shape):
        return f"shape {list(t.shape)} in the file, {list(shape)} expected"
    if not t.is_floating_point():
        return f"dtype {t.dtype} in the file, a floating-point type expected"
    if not bool(torch.isfinite(t).all()):
        return "it holds NaN or infinity"
    return None


def report_extra(stored: Stored, tensors: Mapping[str, Tensor], expected: Collection[str]) -> None:
    """A problem for every tensor that nothing asked for."""
    for key, t in tensors.items():
        stored.problems.append(
            f"extra: {key!r} {list(t.shape)} belongs to nothing in this adapter"
            f"{nearest('expected', key, expected, stored.problems)}"
        )


def nearest(where: str, name: str, have: Collection[str], problems: Collection[str]) -> str:
    """The end of a message, with the names that were meant; the search is slow, so only where it
    will be read.
    """
    if len(problems) >= SHOWN:
        return ""
    near = get_close_matches(name, [h for h in have if h], n=2, cutoff=0.5)
    return f"; nearest {where}: {near or 'none'}"


def refuse(path: Any, problems: list[str]) -> None:
    """Raise CheckpointError listing the problems, if there are any."""
    if problems:
        shown = problems[:SHOWN] + (
            [f"... and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        )
        raise CheckpointError(
            f"{path} does not fit:\n  "
            + "\n  ".join(shown)
            + "\nload(..., strict=False) fills what "
            "fits and returns a report."
        )
