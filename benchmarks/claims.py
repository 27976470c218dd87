"""What a case has to show: a number out of its samples, held against a target, and the same number
of the peers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from .timing import quartiles, ratio

Samples = Mapping[str, Mapping[str, Sequence[float]]]


@dataclass(frozen=True)
class Claim:
    """`metric` of the contender `over`, divided by that of `under` where one is given.

    at_most: the target; None where the number is only shown. peer: the contenders (over, under) of
    the other side. note: what stands in the target's place where there is none. digits: to which
    the number is printed and compared. scale: of a number that is not divided, 1000 for
    milliseconds. floor: the contender whose number stands in the target's place, as "floor 4.4".
    headline: one of the few rows in the README.
    """

    text: str
    metric: str
    over: str
    under: str | None = None
    at_most: float | None = None
    peer: tuple[str, str | None] | None = None
    note: str = ""
    digits: int = 2
    scale: float = 1.0
    floor: str | None = None
    headline: bool = False
    main: bool = True  # a row of the table, rather than one of what else is measured


def evaluate(claim: Claim, samples: Samples) -> dict[str, Any]:
    """One row of the table. status: ok, missed, shown (no target), or unmeasured, with the reason
    in `why`.
    """
    row: dict[str, Any] = {
        "text": claim.text,
        "metric": claim.metric,
        "over": claim.over,
        "under": claim.under,
        "target": claim.at_most,
        "note": claim.note,
        "digits": claim.digits,
        "main": claim.main,
        "headline": claim.headline,
        "value": None,
        "quartiles": None,
        "peers": None,
        "why": "",
    }
    missing = _missing(claim.metric, claim.over, claim.under, samples)
    if missing:
        return {**row, "status": "unmeasured", "why": missing}
    row["value"], row["quartiles"] = _value(claim, claim.over, claim.under, samples)
    if claim.peer is not None and not _missing(claim.metric, *claim.peer, samples):
        row["peers"] = _value(claim, *claim.peer, samples)[0]
    if claim.floor is not None and not _missing(claim.metric, claim.floor, None, samples):
        floor = _value(claim, claim.floor, None, samples)[0]
        row["note"] = f"floor {floor:.{claim.digits}f}"
    return {**row, "status": _status(claim, row["value"])}


def _missing(metric: str, over: str, under: str | None, samples: Samples) -> str:
    for name in (over, under):
        if name is not None and not samples.get(name, {}).get(metric):
            return "no counter" if metric == "norms" else f"{name} has no {metric}"
    return ""


def _value(
    claim: Claim, over: str, under: str | None, samples: Samples
) -> tuple[float, list[float]]:
    values = samples[over][claim.metric]
    if under is None:
        values = [claim.scale * value for value in values]
        return median(values), quartiles(values)
    return ratio(values, samples[under][claim.metric])


def _status(claim: Claim, value: float) -> str:
    if claim.at_most is None:
        return "shown"
    if not math.isfinite(value):
        return "missed"
    return "ok" if round(value, claim.digits) <= claim.at_most else "missed"
