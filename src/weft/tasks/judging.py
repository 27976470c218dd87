"""Grades answers with a judge model, stores every judgment at once, and summarises the grades."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial

from .endpoint import Attempt, Endpoint, Refused, Unanswered
from .files import Row
from .generation import Report, Scores
from .journal import Journal
from .mt_bench import Ask, grade

# Consecutive questions without an answer: the judge is probably down, and the others would only wait.
GIVE_UP = 3
JUDGED, UNPARSABLE = "judged", "unparsable"


@dataclass(frozen=True)
class Outcome:
    """Judgments by `request`, the reasons for missing ones, and why the run stopped early, if it
    did.
    """

    judgments: Mapping[str, Row]
    unanswered: Mapping[str, str]
    stopped: str | None = None


def judge_all(
    wanted: Sequence[Ask],
    judge: Endpoint,
    judgments: Journal,
    attempts: Journal,
    *,
    again: bool = False,
    on_progress: Callable[[str], None] = lambda _: None,
) -> Outcome:
    """Asks for every judgment that `judgments` does not have, and stores each one at once.

    `again` repeats questions if the judge's text had no grade. A question without an answer after
    all tries is left for the next run. After GIVE_UP consecutive ones, or one that is `Refused`, no
    more questions are asked.
    """
    stored = _newest(judgments.rows)
    missing: dict[str, str] = {}
    stopped, in_a_row = None, 0
    for number, ask in enumerate(wanted, start=1):
        if ask.request in stored and not (again and stored[ask.request]["status"] == UNPARSABLE):
            continue
        try:
            text = judge.ask(ask.messages, partial(_failed, ask, attempts, on_progress))
        except (Unanswered, Refused) as error:
            missing[ask.request] = str(error)
            in_a_row += 1
            if isinstance(error, Refused):
                stopped = str(error)
            elif in_a_row == GIVE_UP:
                stopped = f"{GIVE_UP} consecutive questions got no answer; the last: {error}"
            if stopped is not None:
                break
            continue
        in_a_row = 0
        score = grade(text)
        judgments.append(
            {
                **ask.name,
                "category": ask.question.category,
                "judge": judge.model,
                "url": judge.url,
                "status": JUDGED if score is not None else UNPARSABLE,
                "score": score,
                "judgment": text,
                "time": _now(),
            }
        )
        stored[ask.request] = judgments.rows[-1]
        on_progress(
            f"{number}/{len(wanted)} question {ask.question.id}, turn {ask.turn}: "
            + (f"{score:g}" if score is not None else "no grade in the judge's text")
        )
    return Outcome(
        {ask.request: stored[ask.request] for ask in wanted if ask.request in stored},
        {request: why for request, why in missing.items() if request not in stored},
        stopped,
    )


def _newest(rows: Iterable[Row]) -> dict[str, Row]:
    """The newest judgment per request."""
    return {
        row["request"]: row
        for row in rows
        if row.get("status") in (JUDGED, UNPARSABLE) and "request" in row
    }


def _failed(
    ask: Ask, attempts: Journal, on_progress: Callable[[str], None], failed: Attempt
) -> None:
    attempts.append(
        {
            **ask.name,
            "try": failed.number,
            "status": failed.status,
            "reason": failed.reason,
            "pause": failed.pause,
            "time": _now(),
        }
    )
    on_progress(
        f"question {ask.question.id}, turn {ask.turn}: {failed.reason}"
        + (f"; again in {failed.pause:.1f} seconds" if failed.pause is not None else "")
    )


def summary(wanted: Sequence[Ask], outcome: Outcome) -> tuple[Report, dict[str, int]]:
    """Returns the mean grades (of all, per turn, per category), and how many answers have none for
    which reason.

    Answers without a grade are in no mean; a mean of nothing is None.
    """
    grades: dict[str, list[float]] = {"average": []}
    unparsable = 0
    for ask in wanted:
        groups = [
            grades.setdefault(f"turn {ask.turn}", []),
            grades.setdefault(f"category {ask.question.category}", []),
        ]
        judgment = outcome.judgments.get(ask.request)
        if judgment is not None and judgment["score"] is not None:
            for group in (grades["average"], *groups):
                group.append(judgment["score"])
        unparsable += judgment is not None and judgment["score"] is None
    ordered = sorted(
        grades, key=lambda name: (not name.startswith("average"), not name.startswith("turn"), name)
    )
    scores: Scores = {
        name: sum(grades[name]) / len(grades[name]) if grades[name] else None for name in ordered
    }
    counts = {
        "answers": len(wanted),
        "graded": len(grades["average"]),
        "unparsable": unparsable,
        "unanswered": len(outcome.unanswered),
    }
    counts["not asked"] = counts["answers"] - sum(
        counts[name] for name in ("graded", "unparsable", "unanswered")
    )
    reasons = {
        name: "no answer of this group has a grade"
        for name, value in scores.items()
        if value is None
    }
    return Report(scores, reasons, tuple(_judgment_notes(counts, outcome))), counts


def _judgment_notes(counts: Mapping[str, int], outcome: Outcome) -> list[str]:
    reasons = {
        "unparsable": "the judge's text has no grade: these count as failures, not as zero",
        "unanswered": "the judge gave no answer",
        "not asked": "not asked yet",
    }
    notes = [
        f"{counts[name]} of {counts['answers']} answers: {text}."
        for name, text in reasons.items()
        if counts[name]
    ]
    if counts["graded"] < counts["answers"]:
        notes.append(
            f"The means are over {counts['graded']} of {counts['answers']} answers, so they are "
            "not an MT-Bench score yet."
        )
    urls = sorted({str(row.get("url")) for row in outcome.judgments.values()})
    if len(urls) > 1:
        notes.append(f"The judgments are from {len(urls)} addresses: {', '.join(urls)}.")
    if outcome.stopped is not None:
        notes.append(f"Stopped: {outcome.stopped.rstrip('.')}.")
    return notes


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
