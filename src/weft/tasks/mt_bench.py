"""MT-Bench (arXiv:2306.05685): open questions in two turns, each answer graded from 1 to 10 by a
judge model.

Files are FastChat's: questions `{question_id, category, turns, reference}`, answers `{question_id,
choices: [{turns}]}`, a line each. A file of answers by a reference model, of the same form as
answers, may replace the references of the questions; the benchmark's own protocol does that
(GPT-4's answers for math, reasoning and coding). Questions of one turn work too.

The judge sees one answer at a time: the first turn alone, then the conversation with the second
turn to grade. Its prompt is ours; FastChat's file judge_prompts.jsonl (Apache-2.0) is read where it
is given. Another prompt is another scale, so the prompt is part of a judgment's `request`, the
digest of everything the judge was sent, by which a judgment is found again.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import WeftError
from .endpoint import Attempt, Endpoint, Message, Refused, Unanswered
from .files import Row, columns, read_rows
from .generation import Report, Scores
from .journal import Journal

LOWEST, HIGHEST = 1.0, 10.0
# questions in a row that got no answer: the judge is dead, and the others would only wait for
# nothing
GIVE_UP = 3
JUDGED, UNPARSABLE = "judged", "unparsable"
SETTINGS = {"temperature": 0, "max_tokens": 2048}
_GRADE = re.compile(r"\[\[\s*(-?\d+(?:\.\d*)?)\s*\]\]")
_FIELD = re.compile(
    r"\{(question|answer|question_1|question_2|answer_1|answer_2|ref_answer_1|ref_answer_2)\}"
)

_SYSTEM = "You grade answers of an AI assistant. You are strict and fair, and it is all the same to you who wrote them."
_HOW = (
    "Give a grade from 1 (of no use) to 10 (nothing to improve). What counts: is the request "
    "fulfilled in every part, "
    "is what is said true, does it go deep enough, is it clear. Length alone earns "
    "nothing.{reference} Say in a few "
    "sentences what is good and what is wrong. Then write the grade in double square brackets on a "
    "last line of its "
    "own, in exactly this form:\nGrade: [[4]]"
)
_REFERENCE = (
    " Compare with the reference answer first and name each mistake; the reference is right, but "
    "another answer "
    "may be right too."
)
_ONE = "Grade the answer to this question.\n\n<question>\n{question}\n</question>\n\n"
_TWO = (
    "Grade the assistant's second answer in this conversation; the first is there for context "
    "only.\n\n"
    "<user>\n{question_1}\n</user>\n\n<assistant>\n{answer_1}\n</assistant>\n\n"
    "<user>\n{question_2}\n</user>\n\n<assistant>\n{answer_2}\n</assistant>\n\n"
)
_REF_ONE = "<reference>\n{ref_answer_1}\n</reference>\n\n"
_REF_TWO = "<reference turn=1>\n{ref_answer_1}\n</reference>\n\n<reference turn=2>\n{ref_answer_2}\n</reference>\n\n"
_ANSWER = "<answer>\n{answer}\n</answer>\n\n"
# By (turn, is there a reference): what the system message and the question to the judge are.
OURS = {
    (1, False): (_SYSTEM, _ONE + _ANSWER + _HOW.replace("{reference}", "")),
    (1, True): (_SYSTEM, _ONE + _REF_ONE + _ANSWER + _HOW.replace("{reference}", _REFERENCE)),
    (2, False): (_SYSTEM, _TWO + _HOW.replace("{reference}", "")),
    (2, True): (_SYSTEM, _TWO + _REF_TWO + _HOW.replace("{reference}", _REFERENCE)),
}
FASTCHAT = {
    (1, False): "single-v1",
    (1, True): "single-math-v1",
    (2, False): "single-v1-multi-turn",
    (2, True): "single-math-v1-multi-turn",
}
Prompts = Mapping[tuple[int, bool], tuple[str, str]]


@dataclass(frozen=True)
class Question:
    """turns: one or two. references: as many as turns, "" where a turn has none."""

    id: int | str
    category: str
    turns: tuple[str, ...]
    references: tuple[str, ...]


@dataclass(frozen=True)
class Ask:
    """One answer to grade: what the judge is sent, and its digest, under which the judgment is
    kept.
    """

    question: Question
    turn: int
    messages: tuple[Message, ...]
    request: str

    @property
    def name(self) -> dict[str, Any]:
        return {"question_id": self.question.id, "turn": self.turn, "request": self.request}


@dataclass(frozen=True)
class Outcome:
    """Judgments of these asks by `request`, and why an ask has none."""

    judgments: Mapping[str, Row]
    unanswered: Mapping[str, str]
    stopped: str | None = None


def read_questions(path: Path, references: Path | None = None) -> list[Question]:
    """In the file's order. references: a reference model's answers, in place of those of the
    questions.

    Raises WeftError with the row at fault: a field that is missing, a number twice, no turn or more
    than two.
    """
    rows = read_rows(path)
    columns(rows, str(path), "question_id", "category", "turns")
    given = None if references is None else read_answers(read_rows(references), str(references))
    found: dict[int | str, Question] = {}
    for number, row in enumerate(rows, start=1):
        where = f"{path}, row {number}"
        name, turns = row["question_id"], _texts(row["turns"], f"{where}, turns")
        if not 1 <= len(turns) <= 2 or not all(turns):
            raise WeftError(
                f"{where}: a question has one turn or two, and none is empty; this has "
                f"{len(turns)}."
            )
        if name in found:
            raise WeftError(f"{where}: question_id {name!r} is there twice.")
        held = (
            given.get(name, ())
            if given is not None
            else _texts(row.get("reference") or [], f"{where}, reference")
        )
        if len(held) > len(turns):
            raise WeftError(f"{where}: {len(held)} references for {len(turns)} turns.")
        found[name] = Question(
            name, str(row["category"]), turns, (*held, *[""] * (len(turns) - len(held)))
        )
    if given is not None and not set(given) & set(found):
        raise WeftError(f"{references}: it answers none of the questions of {path}.")
    return list(found.values())


def read_answers(rows: Sequence[Row], where: str) -> dict[int | str, tuple[str, ...]]:
    """Turns by question_id. Raises WeftError: another form, a question answered twice or in several
    ways.
    """
    found: dict[int | str, tuple[str, ...]] = {}
    for number, row in enumerate(rows, start=1):
        choices = row.get("choices")
        one = choices[0] if isinstance(choices, list) and len(choices) == 1 else None
        if "question_id" not in row or not isinstance(one, dict):
            raise WeftError(
                f"{where}, row {number}: it must have question_id, and choices with one choice; it "
                "has "
                f"{sorted(map(str, row))}."
            )
        if row["question_id"] in found:
            raise WeftError(
                f"{where}, row {number}: question_id {row['question_id']!r} is there twice."
            )
        found[row["question_id"]] = _texts(one.get("turns"), f"{where}, row {number}, turns")
    return found


def _texts(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise WeftError(f"{where}: it must be a list of texts, and it is {str(value)[:40]!r}.")
    return tuple(value)


def read_prompts(path: Path) -> Prompts:
    """The four prompts for single answers of FastChat's judge_prompts.jsonl. Raises WeftError: one
    is missing.
    """
    rows = {row.get("name"): row for row in read_rows(path)}
    missing = [name for name in FASTCHAT.values() if name not in rows]
    if missing:
        raise WeftError(f"{path} has no prompt named {missing}; it has {sorted(map(str, rows))}.")
    columns(
        [rows[name] for name in FASTCHAT.values()], str(path), "system_prompt", "prompt_template"
    )
    return {
        key: (str(rows[name]["system_prompt"]), str(rows[name]["prompt_template"]))
        for key, name in FASTCHAT.items()
    }


def asks(
    questions: Iterable[Question],
    answers: Mapping[int | str, tuple[str, ...]],
    judge: Endpoint,
    prompts: Prompts,
    where: str,
) -> list[Ask]:
    """One for each turn of each question. Raises WeftError: a question without an answer to each of
    its turns.
    """
    found, missing = [], []
    for question in questions:
        given = answers.get(question.id, ())
        if len(given) < len(question.turns):
            missing.append(question.id)
            continue
        for turn in range(1, len(question.turns) + 1):
            messages = _messages(question, given, turn, prompts)
            sent = json.dumps(judge.body(messages), sort_keys=True).encode()
            found.append(Ask(question, turn, messages, hashlib.sha256(sent).hexdigest()[:16]))
    if missing:
        raise WeftError(
            f"{where} has no answer to each turn of {len(missing)} questions (the first: "
            f"{missing[0]!r}). Run "
            "with --model M to have them generated, or --limit N for the first N questions."
        )
    return found


def _messages(
    question: Question, answers: Sequence[str], turn: int, prompts: Prompts
) -> tuple[Message, ...]:
    system, template = prompts[turn, bool(question.references[turn - 1])]
    fields = {"question": question.turns[0], "answer": answers[0]}
    for i, (asked, said, right) in enumerate(
        zip(question.turns, answers, question.references, strict=False), start=1
    ):
        fields |= {
            f"question_{i}": asked,
            f"answer_{i}": said,
            f"ref_answer_{i}": right or "(none)",
        }
    # In one pass, so that braces in an answer stay what they are.
    text = _FIELD.sub(lambda match: fields[match[1]], template)
    return ({"role": "system", "content": system}, {"role": "user", "content": text})


def grade(text: str) -> float | None:
    """The grade in a judge's text: [[7]] on its last line, else the one value that all [[...]] in
    it have.

    None: there is none, several differ, or it is no number from 1 to 10. A judge that speaks of
    [[1]] in code and then grades on another line than the last is not understood, which is better
    than misunderstood.
    """
    lines = [line for line in text.splitlines() if line.strip()]
    for part in (lines[-1] if lines else "", text):
        found = {float(value) for value in _GRADE.findall(part)}
        if found:
            value = found.pop()
            return value if not found and LOWEST <= value <= HIGHEST else None
    return None


def judge_all(
    wanted: Sequence[Ask],
    judge: Endpoint,
    judgments: Journal,
    attempts: Journal,
    *,
    again: bool = False,
    told: Callable[[str], None] = lambda _: None,
) -> Outcome:
    """Ask for every judgment that `judgments` does not hold, and keep each as soon as it is there.

    again: ask once more where the judge's text had no grade. A question whose tries are used up is
    left for the next run; after GIVE_UP of them in a row, or one that is `Refused`, the judge is
    asked no more.
    """
    held = _kept(judgments.rows)
    missing: dict[str, str] = {}
    stopped, in_a_row = None, 0
    for place, ask in enumerate(wanted, start=1):
        if ask.request in held and not (again and held[ask.request]["status"] == UNPARSABLE):
            continue
        try:
            text = judge.ask(ask.messages, partial(_failed, ask, attempts, told))
        except (Unanswered, Refused) as error:
            missing[ask.request] = str(error)
            in_a_row += 1
            if isinstance(error, Refused):
                stopped = str(error)
            elif in_a_row == GIVE_UP:
                stopped = f"{GIVE_UP} questions in a row got no answer; the last: {error}"
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
        held[ask.request] = judgments.rows[-1]
        told(
            f"{place}/{len(wanted)} question {ask.question.id}, turn {ask.turn}: "
            + (f"{score:g}" if score is not None else "no grade in the judge's text")
        )
    return Outcome(
        {ask.request: held[ask.request] for ask in wanted if ask.request in held},
        {request: why for request, why in missing.items() if request not in held},
        stopped,
    )


def _kept(rows: Iterable[Row]) -> dict[str, Row]:
    """The newest judgment of each request."""
    return {
        row["request"]: row
        for row in rows
        if row.get("status") in (JUDGED, UNPARSABLE) and "request" in row
    }


def _failed(ask: Ask, attempts: Journal, told: Callable[[str], None], failed: Attempt) -> None:
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
    told(
        f"question {ask.question.id}, turn {ask.turn}: {failed.reason}"
        + (f"; again in {failed.pause:.1f} seconds" if failed.pause is not None else "")
    )


def summary(wanted: Sequence[Ask], outcome: Outcome) -> tuple[Report, dict[str, int]]:
    """Mean grades (of all, per turn, per category), and how many answers have none for which
    reason.

    What has no grade is in no mean; a mean of nothing is None.
    """
    grades: dict[str, list[float]] = {"average": []}
    unparsable = 0
    for ask in wanted:
        groups = [
            grades.setdefault(f"turn {ask.turn}", []),
            grades.setdefault(f"category {ask.question.category}", []),
        ]
        found = outcome.judgments.get(ask.request)
        if found is not None and found["score"] is not None:
            for group in (grades["average"], *groups):
                group.append(found["score"])
        unparsable += found is not None and found["score"] is None
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
    return Report(scores, reasons, tuple(_notes(counts, outcome))), counts


def _notes(counts: Mapping[str, int], outcome: Outcome) -> list[str]:
    said = {
        "unparsable": "the judge's text has no grade: counted as failures, not as zero",
        "unanswered": "the judge gave no answer",
        "not asked": "not asked yet",
    }
    notes = [
        f"{counts[name]} of {counts['answers']} answers: {text}."
        for name, text in said.items()
        if counts[name]
    ]
    if counts["graded"] < counts["answers"]:
        notes.append(
            f"The means are over {counts['graded']} of {counts['answers']} answers, so they are no "
            "MT-Bench score "
            "yet."
        )
    places = sorted({str(row.get("url")) for row in outcome.judgments.values()})
    if len(places) > 1:
        notes.append(f"The judgments are from {len(places)} addresses: {', '.join(places)}.")
    if outcome.stopped is not None:
        notes.append(f"Stopped: {outcome.stopped.rstrip('.')}.")
    return notes


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
