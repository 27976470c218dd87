"""Faults in a checkpoint, collected as sentences, so that one error lists them all."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..methods.base import Shape
from ..methods.config import DTYPES

SHOWN = 12  # problems in the text of an error
_LONGEST, _MOST_NAMES = 300, 2000  # of the names that `nearest` compares
_LONGEST_PROBLEM = 800
_CHUNK = 2**22


def take(
    tensors: dict[str, Tensor],
    key: str,
    shape: Shape | None,
    what: str,
    problems: list[str],
    values: bool = True,
) -> Tensor | None:
    """Removes `key` from `tensors` and returns its tensor [shape].

    Returns None and adds a problem if it is missing or not usable. With values=False its values are
    not read yet.
    """
    found = tensors.pop(key, None)
    fault = None if found is None else fault_of(found, shape, values)
    if found is None:
        problems.append(
            f"missing: {key!r} ({what}){nearest('in the file', key, tensors, problems)}"
        )
    elif fault is not None:
        problems.append(f"{key!r} ({what}): {fault}")
    return found if fault is None else None


def fault_of(t: Tensor, shape: Shape | None, values: bool = True) -> str | None:
    """Returns why a tensor from a file cannot be used as one of `shape` ([...] if None), or None.
    The values, of which a file may claim any number, are read last, and only if asked for.
    """
    if t.numel() == 0 and shape != tuple(t.shape):
        return (
            f"it is empty, shape {list(t.shape)}; a sharded model must gather its tensors before "
            "saving"
        )
    if shape is not None and tuple(t.shape) != tuple(shape):
        return f"shape {list(t.shape)} in the file, {list(shape)} expected"
    if t.dtype not in DTYPES.values():
        return f"dtype {t.dtype} in the file, a floating-point type expected, one of {list(DTYPES)}"
    if not values:
        return None
    parts = torch.split(t.reshape(-1), _CHUNK)
    if not all(bool(part.isfinite().all()) for part in parts):
        return "it holds NaN or infinity"
    return None


def report_extra(
    problems: list[str], tensors: Mapping[str, Tensor], expected: Collection[str]
) -> None:
    """Adds a problem for every tensor [...] that is left over."""
    for key, t in tensors.items():
        problems.append(
            f"extra: {key!r} {list(t.shape)} belongs to nothing in this adapter"
            f"{nearest('expected', key, expected, problems)}"
        )


def nearest(where: str, name: str, have: Collection[str], problems: Collection[str]) -> str:
    """Returns the end of a message, with the most similar names.

    The search is slow, so the text is empty once there are more problems than an error shows.
    """
    if len(problems) >= SHOWN or len(name) > _LONGEST:
        return ""
    names = [h for h in have if 0 < len(h) <= _LONGEST]
    if len(names) > _MOST_NAMES:  # of a large model the names that end alike
        ending = name.rpartition(".")[2]
        names = [h for h in names if h.endswith(ending)] or names
    near = get_close_matches(name, names[:_MOST_NAMES], n=2, cutoff=0.5)
    return f"; nearest {where}: {near or 'none'}"


def refuse(path: Any, problems: list[str]) -> None:
    """Raises CheckpointError with the problems, if there are any."""
    if problems:
        shown = [_cut(problem) for problem in problems[:SHOWN]] + (
            [f"... and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        )
        raise CheckpointError(
            f"{path} does not fit:\n  "
            + "\n  ".join(shown)
            + "\nload(..., strict=False) fills what fits and returns a report."
        )


def _cut(problem: str) -> str:
    return problem if len(problem) <= _LONGEST_PROBLEM else f"{problem[:_LONGEST_PROBLEM]}..."


def misfit(value: Tensor, live: Tensor) -> str | None:
    """Returns why a base tensor [...] from a file cannot replace this parameter [...], or None."""
    if live.is_meta:
        return "the model's is on the meta device and has no values; load the base model first"
    if not live.is_floating_point() and value.dtype == live.dtype and value.shape == live.shape:
        return None
    return fault_of(value, tuple(live.shape))


def same_values(live: Tensor, value: Tensor) -> bool:
    """Returns True if the tensors [...] are equal in the coarser of their dtypes."""
    live = live.detach().cpu()
    if live.shape != value.shape or live.is_floating_point() != value.is_floating_point():
        return False
    return torch.equal(live.to(value.dtype), value) or torch.equal(live, value.to(live.dtype))
