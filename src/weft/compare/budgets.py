"""What every method gets the same of: steps, trainable parameters (through its rank), or wall-clock
(through its steps).

Wall-clock becomes a number of steps before anything is trained: as many as the method's step, timed
alone on this machine, fits into the time. So a run does not depend on what else the machine does,
has a schedule that ends where it ends, and gives the same bits when it is done again.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..auditing.audit import AUDIT_AFTER
from ..errors import ConfigError
from .entries import Entry

STEPS, PARAMETERS, SECONDS = "steps", "parameters", "seconds"
NEAR = 0.05  # counts further from the budget than this are told


@dataclass(frozen=True)
class Equal:
    """What is equal. `amount`: numbers or seconds; None means that of `steps`, or the first
    method's parameters.
    """

    what: str = STEPS
    amount: float | None = None

    def __str__(self) -> str:
        return self.what if self.amount is None else f"{self.what}={self.amount:.15g}"


def check(equal: Equal, entries: Sequence[Entry]) -> None:
    """Refuse a first method that sets no budget, and a rank that was asked for and would be chosen.
    Raises ConfigError.
    """
    if equal.what != PARAMETERS:
        return
    if equal.amount is None and entries[0].method == "Head":
        raise ConfigError(
            f"--budget {equal}: {entries[0].label} trains nothing but the head, so it sets no "
            "budget. Put "
            "another method first, or write parameters=N."
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


def nearest_rank(count: Callable[[int], int], target: int, low: int, most: int) -> int:
    """The rank in [low, most] whose `count`, which grows with the rank, is nearest to `target`; of
    two, the smaller.
    """
    above = low + bisect_left(range(low, most), target, key=count)
    return min(
        (rank for rank in (above - 1, above) if rank >= low),
        key=lambda rank: abs(count(rank) - target),
    )


def lowest_rank(config: Any) -> int:
    """AdaLoRA's final and DyLoRA's smallest rank are bounds where they are set."""
    return max(getattr(config, name, None) or 1 for name in ("target_r", "r_min"))


def with_ranks(
    entries: Sequence[Entry], found: Mapping[str, Mapping[str, Any]], target: int
) -> tuple[list[Entry], list[str]]:
    """The entries with the ranks that a bench found (`Bench.ranks`), and what is to be said about
    them.
    """
    out, kept, far = [], [], []
    for entry in entries:
        answer = found[entry.label]
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
                    f"--budget parameters makes two rows alike: {entry.label!r}. Leave one of them "
                    "out."
                )
            if abs(answer["trainable"] - target) > NEAR * target:
                far.append(f"{entry.label} ({answer['trainable']:,})")
        out.append(entry)
    notes = [f"Ranks were chosen for {target:,} trainable parameters."]
    notes += (
        [f"Without a rank, and so with the parameters that they have: {', '.join(kept)}."]
        if kept
        else []
    )
    notes += (
        [f"No rank comes nearer to {target:,} than {100 * NEAR:.0f} %: {', '.join(far)}."]
        if far
        else []
    )
    return out, notes


def with_steps(
    entries: Sequence[Entry], seconds: float, costs: Mapping[str, Mapping[str, Any]]
) -> list[Entry]:
    """The entries with as many steps as their measured step time fits into `seconds`."""
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
                    refused=f"{seconds:g} s are too few for {AUDIT_AFTER} steps of "
                    f"{cost['step_seconds']:.3g} s, which a run needs; give more seconds",
                )
            )
            continue
        out.append(replace(entry, steps=steps))
    return out
