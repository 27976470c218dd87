"""What is equal for all methods: steps, trainable parameters, or wall-clock time.

Parameters are equalised through the rank, wall-clock time through the number of steps: as many as
fit into the time, at the method's step time measured alone on this machine. So a run does not
depend on other load, its schedule ends where it should, and repeating it gives the same bits.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...auditing.audit import AUDIT_AFTER
from ...errors import ConfigError
from .entries import Entry

STEPS, PARAMETERS, SECONDS = "steps", "parameters", "seconds"
NEAR = 0.05  # relative distance from the budget above which a note is added


@dataclass(frozen=True)
class Equal:
    """What is equal, and how much of it.

    `amount` is a number of parameters or seconds. None means the steps of the budget, or the
    parameters of the first method.
    """

    what: str = STEPS
    amount: float | None = None

    def __str__(self) -> str:
        return self.what if self.amount is None else f"{self.what}={self.amount:.15g}"


def check_budget(equal: Equal, entries: Sequence[Entry]) -> None:
    """Refuses a first method without parameters to compare with, and an explicit rank that the
    budget would choose. Raises ConfigError.
    """
    if equal.what != PARAMETERS:
        return
    if equal.amount is None and entries[0].method == "Head":
        raise ConfigError(
            f"--budget {equal}: {entries[0].label} trains nothing but the head, so it sets no "
            "budget. Put another method first, or write parameters=N."
        )
    for entry in entries if equal.amount is not None else entries[1:]:
        if "r" in entry.given:
            raise ConfigError(
                f"--budget {equal} chooses the rank of {entry.label!r}: leave r={entry.config.r} "
                "out"
                + (
                    ", or put it first: its parameters are then the budget."
                    if equal.amount is None
                    else "."
                )
            )


def nearest_rank(count: Callable[[int], int], target: int, low: int, limit: int) -> int:
    """Returns the rank in [low, limit] whose `count` is nearest to `target`; the smaller one of
    two.

    `count` must grow with the rank.
    """
    above = low + bisect_left(range(low, limit), target, key=count)
    return min(
        (rank for rank in (above - 1, above) if rank >= low),
        key=lambda rank: abs(count(rank) - target),
    )


def lowest_rank(config: Any) -> int:
    """Returns the lower bound of a rank: AdaLoRA's final or DyLoRA's smallest rank,
    if set, else 1.
    """
    return max(getattr(config, name, None) or 1 for name in ("target_r", "r_min"))


def with_ranks(
    entries: Sequence[Entry], ranked: Mapping[str, Mapping[str, Any]], target: int
) -> tuple[list[Entry], list[str]]:
    """Returns the entries with the ranks in `ranked` (from `TrialRunner.ranks`), and notes about
    them.

    Raises ConfigError if two rows become the same.
    """
    out, kept, far = [], [], []
    for entry in entries:
        answer = ranked[entry.label]
        if "reason" in answer:
            out.append(
                replace(entry, refused=f"its parameters could not be counted: {answer['reason']}")
            )
            continue
        if answer["r"] is None:
            kept.append(f"{entry.label} ({answer['trainable']:,})")
        else:
            if "r" not in entry.given:
                entry = replace(
                    entry,
                    label=f"{entry.label} r={answer['r']}",
                    config=replace(entry.config, r=answer["r"]),
                )
            if any(other.label == entry.label for other in out):
                raise ConfigError(
                    f"--budget parameters makes two rows equal: {entry.label!r}. Remove "
                    "one of them."
                )
            if abs(answer["trainable"] - target) > NEAR * target:
                far.append(f"{entry.label} ({answer['trainable']:,})")
        out.append(entry)
    notes = [f"Ranks were chosen for {target:,} trainable parameters."]
    notes += (
        [f"Methods without a rank keep their number of parameters: {', '.join(kept)}."]
        if kept
        else []
    )
    notes += (
        [f"No rank is within {100 * NEAR:.0f} % of {target:,}: {', '.join(far)}."] if far else []
    )
    return out, notes


def with_steps(
    entries: Sequence[Entry], seconds: float, costs: Mapping[str, Mapping[str, Any]]
) -> list[Entry]:
    """Returns the entries with as many steps as fit into `seconds` at their measured step time."""
    out = []
    for entry in entries:
        cost = costs[entry.label]
        if cost.get("status") == "failed":
            out.append(replace(entry, refused=f"it could not be measured: {cost['reason']}"))
            continue
        steps = int(seconds / cost["step_seconds"])
        if steps < AUDIT_AFTER:
            out.append(
                replace(
                    entry,
                    refused=f"{seconds:g} s are not enough for the {AUDIT_AFTER} steps that a run "
                    f"needs, at {cost['step_seconds']:.3g} s per step; give more seconds",
                )
            )
            continue
        out.append(replace(entry, steps=steps))
    return out
