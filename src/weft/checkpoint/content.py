"""What a checkpoint says, whoever wrote it, and what became of it on loading."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..methods.base import DTYPES, Shape
from ..model.adapter import Adapter


@dataclass
class StoredSite:
    """One adapted layer in a file. `kind` and `shape` (out, in) are None where the file does not say them."""

    rule: Any
    tensors: dict[str, Tensor]
    keys: dict[str, str]  # tensor -> key in the file
    kind: str | None = None
    shape: tuple[int, int] | None = None


@dataclass
class Stored:
    """A checkpoint, read and not yet matched against a model.

    `selected` are base tensors trained as copies. `copies` are base tensors that the file merely repeats. `matrices`
    are VeRA's A and B where the file holds them. `problems` are what is wrong within the file.
    """

    config: Any
    writer: str
    sites: dict[str, StoredSite] = field(default_factory=dict)
    selected: dict[str, Tensor] = field(default_factory=dict)
    copies: dict[str, Tensor] = field(default_factory=dict)
    matrices: tuple[Tensor, Tensor] | None = None
    shared_checksums: dict[str, str] = field(default_factory=dict)
    base: dict[str, Any] = field(default_factory=dict)
    picks_layers: bool = False  # the configuration names layers beyond `targets`, so targets do not tell what is missing
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    numbers: int = 0


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
        head = f"loaded {self.adapter.name!r}: {self.adapter.num_parameters:,} numbers, " \
               f"{len(self.problems)} problem{'' if len(self.problems) == 1 else 's'}"
        return "\n".join([head, *(f"  problem: {p}" for p in self.problems), *(f"  mapped: {m}" for m in self.mapped),
                          *(f"  note: {n}" for n in self.notes)])


def take(tensors: dict[str, Tensor], key: str, shape: Shape | None, what: str, problems: list[str]) -> Tensor | None:
    """Remove `key` from `tensors` and return it; None, with a problem, where it is missing or of another shape."""
    found = tensors.pop(key, None)
    if found is None:
        near = get_close_matches(key, tensors, n=2, cutoff=0.5)
        problems.append(f"missing: {key!r} ({what}); nearest in the file: {near or 'none'}")
        return None
    fault = fault_of(found, shape)
    if fault is not None:
        problems.append(f"{key!r} ({what}): {fault}")
        return None
    return found


def fault_of(t: Tensor, shape: Shape | None) -> str | None:
    """Why a tensor from a file cannot be used, or None."""
    if t.numel() == 0 and shape != tuple(t.shape):
        return f"it is empty, shape {list(t.shape)}; a sharded model must gather its tensors before saving"
    if shape is not None and tuple(t.shape) != tuple(shape):
        return f"shape {list(t.shape)} in the file, {list(shape)} expected"
    if not t.is_floating_point():
        return f"dtype {t.dtype} in the file, a floating-point type expected"
    if not bool(torch.isfinite(t).all()):
        return "it holds NaN or infinity"
    return None


def extra(tensors: Mapping[str, Tensor], expected: list[str]) -> list[str]:
    """A problem for every tensor that nothing asked for."""
    out = []
    for key, t in tensors.items():
        near = get_close_matches(key, expected, n=2, cutoff=0.5)
        out.append(f"extra: {key!r} {list(t.shape)} belongs to no layer of this adapter; nearest expected: {near or 'none'}")
    return out


def refuse(path: Any, problems: list[str]) -> None:
    """Raise CheckpointError listing the problems, if there are any."""
    if problems:
        shown = problems[:12] + ([f"... and {len(problems) - 12} more"] if len(problems) > 12 else [])
        raise CheckpointError(f"{path} does not fit:\n  " + "\n  ".join(shown) + "\nload(..., strict=False) fills what "
                              "fits and returns a report.")


def dtype_of(rule: Any) -> torch.dtype:
    return DTYPES[rule.dtype]
