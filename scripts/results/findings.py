"""What a record shows about its claims, with intervals. Nothing is ordered that the seeds cannot
distinguish.
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
    """Mean of a - b over the seeds, its 95 % t-interval, and the verdict; None if a row lacks a
    score.

    If `idle`, neither row is better than always answering the most frequent class, so there is
    nothing to compare.
    """

    claim: Claim
    mean: float | None
    interval: tuple[float, float] | None
    verdict: str
    idle: bool = False


def findings(
    result: Mapping[str, Any], claims: Sequence[Claim], chance: float | None = None
) -> list[Finding]:
    """Returns the verdict on every claim whose two rows are in the comparison."""
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
    result = UNKNOWN if interval is None or idle else verdict(interval, claim.matches)
    return Finding(claim, mean, interval, result, idle)


def verdict(interval: tuple[float, float], matches: bool) -> str:
    """Returns SEEN if the interval is above the bound, NOT_SEEN if it is below, else UNKNOWN.

    The bound is 0, or minus the margin if the claim is that `a` matches `b`.
    """
    bound = -MARGIN if matches else 0.0
    if interval[0] > bound:
        return SEEN
    return NOT_SEEN if interval[1] < bound else UNKNOWN


def unseen(found: Sequence[Finding]) -> str:
    """Returns sentences about the claims that this comparison does not show."""
    sentences = [
        f"“{one.claim.says}”: {_gap(one)}, {_why(one)}." for one in found if one.verdict != SEEN
    ]
    if not sentences:
        return "Every claim of the table is seen here."
    head = "Not seen here, or not decided:"
    if all(one.idle for one in found):
        head = "None of these claims is tested here: with so few steps no method learns the task."
    elif all(one.verdict == UNKNOWN for one in found):
        head = "None of these claims is decided here: scores vary more over the seeds than methods differ in the papers."
    return f"{head}\n\n" + "\n".join(f"- {sentence}" for sentence in sentences)


def _gap(one: Finding) -> str:
    a, b = one.claim.a, one.claim.b
    if one.mean is None or one.interval is None:
        return f"{a} cannot be compared with {b}"
    low, high = (100 * bound for bound in one.interval)
    side = "above" if one.mean > 0 else "below"
    return f"{a} is {abs(100 * one.mean):.1f} points {side} {b} (95 %: {low:+.1f} to {high:+.1f})"


def _why(one: Finding) -> str:
    if one.mean is None:
        return "because not every seed has a score"
    if one.idle:
        return "and neither is better than always answering the most frequent class"
    if one.verdict == NOT_SEEN:
        return "so the data contradict it on this task"
    return "which is not conclusive"


def groups(result: Mapping[str, Any]) -> tuple[str, list[str], list[str]] | None:
    """Returns the highest mean, the rows that are not significantly below it, and those that are.
    Returns None if nothing was tested.
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
