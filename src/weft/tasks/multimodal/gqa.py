"""GQA: the share of answers that are equal, in percent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...errors import WeftError
from ..generation import Report
from . import by_id


def is_right(prediction: str, answer: str) -> bool:
    """Returns True if an output is the answer, but for case and full stops at its end, as LLaVA's
    script of GQA compares them.
    """
    return prediction.strip().rstrip(".").lower() == answer.strip().lower()


def score_gqa(references: Path, outputs: Path) -> Report:
    """Scores results against GQA's questions, `{id: {"answer"}}`, or VL-Adapter's
    `[{"question_id", "label": {answer: 1.0}}]`. Results: `[{"questionId", "prediction"}]`, or JSON
    lines with `question_id` and `text`. Raises WeftError.
    """
    given = by_id.read_json(references)
    if isinstance(given, dict):
        listed: list[by_id.Row] = [
            {"question_id": k, **_row(references, k, v)} for k, v in given.items()
        ]
    else:
        listed = by_id.rows(references)
    wanted = {
        name: _answer(references, name, value)
        for name, value in by_id.by_id(
            references, listed, ("question_id",), ("answer", "label")
        ).items()
    }
    names = ("questionId", "question_id"), ("prediction", "text", "answer")
    found = by_id.by_id(outputs, by_id.rows(outputs), *names)
    ids = by_id.matched(references, wanted, outputs, found)
    right = sum(is_right(by_id.text(outputs, name, found[name]), wanted[name]) for name in ids)
    return Report({"accuracy": 100 * right / len(ids)}, notes=("Accuracy in percent.",))


def _row(path: Path, name: str, value: Any) -> by_id.Row:
    if not isinstance(value, dict):
        raise WeftError(f"{path}, id {name!r}: not an object with 'answer'.")
    return value


def _answer(path: Path, name: str, value: Any) -> str:
    answer = next(iter(value)) if isinstance(value, dict) and len(value) == 1 else value
    if not isinstance(answer, str):
        raise WeftError(f"{path}, id {name!r}: its answer is no text.")
    return answer


SCORERS = {"gqa": score_gqa}
