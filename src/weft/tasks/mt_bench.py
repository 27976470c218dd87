"""MT-Bench (arXiv:2306.05685): open questions with two turns, each answer graded from 1 to 10 by a
judge model.

Files have FastChat's format, one object per line: questions `{question_id, category, turns,
reference}`, answers `{question_id, choices: [{turns}]}`. A file with the answers of a reference
model can replace the questions' references; the benchmark's protocol does that (GPT-4's answers for
math, reasoning and coding). Questions with one turn work too.

The judge sees one answer at a time: first the first turn alone, then the conversation with the
second turn to grade. The prompt is ours, or FastChat's judge_prompts.jsonl (Apache-2.0) if that is
given. Another prompt gives another scale. The prompt is therefore part of `request`, the digest of
everything that the judge receives, and judgments are stored by it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import WeftError
from .endpoint import Endpoint, Message
from .files import Row, columns, read_rows
from .judge_prompts import Prompts

LOWEST, HIGHEST = 1.0, 10.0
SETTINGS = {"temperature": 0, "max_tokens": 2048}
_GRADE = re.compile(r"\[\[\s*(-?\d+(?:\.\d*)?)\s*\]\]")
_FIELD = re.compile(
    r"\{(question|answer|question_1|question_2|answer_1|answer_2|ref_answer_1|ref_answer_2)\}"
)


@dataclass(frozen=True)
class Question:
    """One or two `turns`, and as many `references`, "" for a turn without one."""

    id: int | str
    category: str
    turns: tuple[str, ...]
    references: tuple[str, ...]


@dataclass(frozen=True)
class Ask:
    """One answer to grade: the messages to the judge, and their digest."""

    question: Question
    turn: int
    messages: tuple[Message, ...]
    request: str

    @property
    def name(self) -> dict[str, Any]:
        """Returns the fields that identify the answer in a journal."""
        return {"question_id": self.question.id, "turn": self.turn, "request": self.request}


def read_questions(path: Path, references: Path | None = None) -> list[Question]:
    """Returns the questions in the order of the file.

    `references` has a reference model's answers, which replace those of the questions. Raises
    WeftError with the invalid row: a missing field, a repeated number, no turn or more than two.
    """
    rows = read_rows(path)
    columns(rows, str(path), "question_id", "category", "turns")
    replacements = (
        None if references is None else read_answers(read_rows(references), str(references))
    )
    questions: dict[int | str, Question] = {}
    for number, row in enumerate(rows, start=1):
        where = f"{path}, row {number}"
        name, turns = row["question_id"], _texts(row["turns"], f"{where}, turns")
        if not 1 <= len(turns) <= 2 or not all(turns):
            raise WeftError(
                f"{where}: a question needs one or two non-empty turns; this one has {len(turns)}."
            )
        if name in questions:
            raise WeftError(f"{where}: question_id {name!r} appears twice.")
        right = (
            replacements.get(name, ())
            if replacements is not None
            else _texts(row.get("reference") or [], f"{where}, reference")
        )
        if len(right) > len(turns):
            raise WeftError(f"{where}: {len(right)} references for {len(turns)} turns.")
        questions[name] = Question(
            name, str(row["category"]), turns, (*right, *[""] * (len(turns) - len(right)))
        )
    if replacements is not None and not set(replacements) & set(questions):
        raise WeftError(f"{references}: it has no answer to a question of {path}.")
    return list(questions.values())


def read_answers(rows: Sequence[Row], where: str) -> dict[int | str, tuple[str, ...]]:
    """Returns turns by question_id. Raises WeftError if the format differs, or if a question has
    more than one answer.
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
                f"{where}, row {number}: question_id {row['question_id']!r} appears twice."
            )
        found[row["question_id"]] = _texts(one.get("turns"), f"{where}, row {number}, turns")
    return found


def _texts(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise WeftError(f"{where}: it must be a list of texts, not {str(value)[:40]!r}.")
    return tuple(value)


def asks(
    questions: Iterable[Question],
    answers: Mapping[int | str, tuple[str, ...]],
    judge: Endpoint,
    prompts: Prompts,
    where: str,
) -> list[Ask]:
    """Returns one `Ask` per turn of each question. Raises WeftError if a turn has no answer."""
    wanted, missing = [], []
    for question in questions:
        given = answers.get(question.id, ())
        if len(given) < len(question.turns):
            missing.append(question.id)
            continue
        for turn in range(1, len(question.turns) + 1):
            messages = _messages(question, given, turn, prompts)
            sent = json.dumps(judge.body(messages), sort_keys=True).encode()
            wanted.append(Ask(question, turn, messages, hashlib.sha256(sent).hexdigest()[:16]))
    if missing:
        raise WeftError(
            f"{where} has no answer to each turn of {len(missing)} questions (the first: "
            f"{missing[0]!r}). Add --model M to generate them, or --limit N for the first N "
            "questions."
        )
    return wanted


def _messages(
    question: Question, answers: Sequence[str], turn: int, prompts: Prompts
) -> tuple[Message, ...]:
    system, template = prompts[turn, bool(question.references[turn - 1])]
    fields = {"question": question.turns[0], "answer": answers[0]}
    for i, (asked, answered, reference) in enumerate(
        zip(question.turns, answers, question.references, strict=False), start=1
    ):
        fields |= {
            f"question_{i}": asked,
            f"answer_{i}": answered,
            f"ref_answer_{i}": reference or "(none)",
        }
    # In one pass, so that braces in an answer are not replaced.
    text = _FIELD.sub(lambda match: fields[match[1]], template)
    return ({"role": "system", "content": system}, {"role": "user", "content": text})


def grade(text: str) -> float | None:
    """Returns the grade in a judge's text: [[7]] on its last line, else the only value of all
    [[...]] in it.

    Returns None if there is none, if several differ, or if it is no number from 1 to 10. A judge
    that writes [[1]] in code and then grades on a line before the last is not understood, which is
    better than misunderstood.
    """
    lines = [line for line in text.splitlines() if line.strip()]
    for part in (lines[-1] if lines else "", text):
        found = {float(value) for value in _GRADE.findall(part)}
        if found:
            value = found.pop()
            return value if not found and LOWEST <= value <= HIGHEST else None
    return None
