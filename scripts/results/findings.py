"""What a record says about its claims, in words and with intervals: nothing is ordered that the
seeds cannot tell apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weft.compare.report.statistics import t_interval

from .experiments import Claim

MARGIN = 0.02  # "matches": not worse by more than two points
ALPHA = 0.05
SEEN, NOT_SEEN, UNKNOWN = "seen", "not seen", "cannot tell"


@dataclass(frozen=True)
class Finding:
    """Mean of a - b over the seeds, its 95 % t-interval, and the verdict; None where a row has not
    all scores.

    idle: neither row gets above whoever always says the most frequent class, so there is nothing to
    compare.
    """

    claim: Claim
    mean: float | None
    interval: tuple[float, float] | None
    verdict: str
    idle: bool = False


def findings(
    result: Mapping[str, Any], claims: Sequence[Claim], chance: float | None = None
) -> list[Finding]:
    """The verdict on every claim whose two rows are in the comparison."""
    rows = {row["method"]: row for row in result["rows"]}
    return [
        _finding(claim, rows[claim.a], rows[claim.b], chance)
        for claim in claims
        if {claim.a, claim.b} <= set(rows)
    ]


def _finding(
    claim: Claim, a: Mapping[str, Any], b: Mapping[str, Any], chance: float | None
) -> Finding:
    if None in (*a["scores"], *b["scores"]):
        return Finding(claim, None, None, UNKNOWN)
    gaps = [x - y for x, y in zip(a["scores"], b["scores"], strict=True)]
    interval = t_interval(gaps)
    mean = sum(gaps) / len(gaps)
    idle = chance is not None and max(a["score_mean"], b["score_mean"]) < chance + MARGIN
    said = UNKNOWN if interval is None or idle else verdict(interval, claim.matches)
    return Finding(claim, mean, interval, said, idle)


def verdict(interval: tuple[float, float], matches: bool) -> str:
    """Better: the whole interval is above 0. Matches: above minus the margin. Not seen: the whole
    interval is below.
    """
    bound = -MARGIN if matches else 0.0
    if interval[0] > bound:
        return SEEN
    return NOT_SEEN if interval[1] < bound else UNKNOWN


def unseen(found: Sequence[Finding]) -> str:
    """What the papers claim and this comparison does not show, in sentences."""
    said = [
        f"“{one.claim.says}”: {_gap(one)}, {_why(one)}." for one in found if one.verdict != SEEN
    ]
    if not said:
        return "Every claim of the table is seen here."
    head = "Not seen here, or not decided:"
    if all(one.idle for one in found):
        head = "None of these claims is tried here: with these few steps no method learns the task."
    elif all(one.verdict == UNKNOWN for one in found):
        head = "None of these claims is decided here: scores spread more over the seeds than methods differ in the papers."
    return f"{head}\n\n" + "\n".join(f"- {sentence}" for sentence in said)


def _gap(one: Finding) -> str:
    a, b = one.claim.a, one.claim.b
    if one.mean is None or one.interval is None:
        return f"{a} is not to be compared with {b}"
    low, high = (100 * bound for bound in one.interval)
    side = "above" if one.mean > 0 else "below"
    return f"{a} is {abs(100 * one.mean):.1f} points {side} {b} (95 %: {low:+.1f} to {high:+.1f})"


def _why(one: Finding) -> str:
    if one.mean is None:
        return "since not every seed has a score"
    if one.idle:
        return "and neither gets above whoever always says the most frequent class"
    if one.verdict == NOT_SEEN:
        return "so the data speak against it on this task"
    return "which decides nothing either way"


def groups(result: Mapping[str, Any]) -> tuple[str, list[str], list[str]] | None:
    """The highest mean, the rows that are not significantly below it, and those that are; None
    where nothing was tested.
    """
    ranking = result.get("ranking")
    if not ranking:
        return None
    p = {
        row["method"]: min(
            row["worse_p"], 1.0 if row.get("worse_p_examples") is None else row["worse_p_examples"]
        )
        for row in result["rows"]
        if row["worse_p"] is not None
    }
    return (
        ranking["best"],
        [name for name, value in p.items() if value >= ALPHA],
        [name for name, value in p.items() if value < ALPHA],
    )
