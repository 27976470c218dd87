"""A case: one kind of measurement, at one shape, of some contenders, and the rows it gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .claims import Claim
from .kinds import (
    deep,
    generate,
    handling,
    importing,
    inference,
    kept,
    kernels,
    mixed,
    overhead,
    step,
    training,
)
from .setup import Setup

KINDS: dict[str, Callable[..., dict[str, Any]]] = {
    "step": step.measure,
    "kept": kept.measure,
    "peak": kept.measure_peak,
    "forward": inference.measure_forward,
    "token": inference.measure_token,
    "mixed": mixed.measure,
    "handling": handling.measure,
    "large": handling.measure_large,
    "import": importing.measure,
    "overhead": overhead.measure,
    "generate": generate.measure,
    "train": training.measure,
    "deep": deep.measure,
    "kernels": kernels.measure,
}
# The columns of a case's details; every contender is compared with the first one.
METRICS = {
    "step": ("step", "whole"),
    "kept": ("saved", "beyond", "held", "peak"),
    "peak": ("process_peak",),
    "forward": ("seconds",),
    "token": ("seconds",),
    "mixed": ("seconds",),
    "handling": ("attach", "save", "load", "switch"),
    "large": ("attach", "load"),
    "import": ("beyond", "process"),
    "overhead": ("forward", "forward_extra", "train", "train_extra"),
    "generate": ("seconds_1", "tokens_1", "seconds_8", "tokens_8"),
    "train": ("process",),
    "deep": ("step", "optimiser", "step_32"),
    "kernels": ("passed", "failed"),
}


@dataclass(frozen=True)
class Case:
    """`weight` is its share of the time; `least` the fewest rounds that are worth a median."""

    name: str
    kind: str
    setup: Setup
    contenders: tuple[str, ...]
    claims: tuple[Claim, ...] = ()
    weight: float = 1.0
    least: int = 5


def select(cases: Sequence[Case], names: str | None) -> list[Case]:
    """The cases of a comma-separated list, in the list's order. Raises ValueError for a name that
    is none of theirs.
    """
    if names is None:
        return list(cases)
    by_name = {case.name: case for case in cases}
    asked = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in asked if name not in by_name]
    if unknown or not asked:
        raise ValueError(
            f"no case {', '.join(unknown) or 'was named'}; there are {', '.join(by_name)}."
        )
    return [by_name[name] for name in asked]
