"""VQAv2, TextVQA and VizWiz: VQA accuracy in percent, as the benchmarks' own tools print it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ...errors import WeftError
from ..generation import Report, Scores
from . import by_id
from .answers import vqa_accuracy

# The rule that each benchmark's published numbers were made with.
PROTOCOL_OF = {"vqav2": "official", "textvqa": "textvqa", "vizwiz": "textvqa"}
_IDS = ("question_id", "image")


def score_vqa(
    references: Path, outputs: Path, task: str = "vqav2", protocol: str | None = None
) -> Report:
    """Scores results against annotations, both as the authors have them. `protocol`: None for that
    of the benchmark. Raises WeftError if a row is invalid or an id is in one file alone.

    Annotations: `{"annotations": [{"question_id", "answers": [{"answer"}]}]}` (VQAv2),
    `{"data": [{"question_id", "answers": [text]}]}` (TextVQA), `[{"image", "answers"}]` (VizWiz).
    Results: `[{"question_id", "answer"}]`, or JSON lines with `text`.
    """
    rule = protocol or PROTOCOL_OF[task]
    listed = by_id.rows(references, ("annotations", "data"))
    wanted = {
        name: _answers(references, name, value)
        for name, value in by_id.by_id(references, listed, _IDS, ("answers",)).items()
    }
    found = by_id.by_id(outputs, by_id.rows(outputs), _IDS, ("answer", "text"))
    each = {
        name: 100 * vqa_accuracy(by_id.text(outputs, name, found[name]), wanted[name], rule)
        for name in by_id.matched(references, wanted, outputs, found)
    }
    scores: Scores = {"accuracy": sum(each.values()) / len(each)}
    for row in listed:
        if isinstance(row.get("answer_type"), str):
            scores.setdefault(f"accuracy, {row['answer_type']}", None)
    for group in list(scores)[1:]:
        ids = [_id(row) for row in listed if group == f"accuracy, {row.get('answer_type')}"]
        scores[group] = sum(each[name] for name in ids) / len(ids)
    return Report(scores, notes=(f"VQA accuracy by the rule {rule!r}, in percent.",))


def _id(row: by_id.Row) -> str:
    return str(next(row[name] for name in _IDS if row.get(name) is not None))


def _answers(path: Path, name: str, value: Any) -> list[str]:
    found = value if isinstance(value, Sequence) and not isinstance(value, str) else []
    given = [one.get("answer") if isinstance(one, dict) else one for one in found]
    texts = [one for one in given if isinstance(one, str)]
    if not texts or len(texts) < len(given):
        raise WeftError(
            f"{path}, id {name!r}: 'answers' is not a list of texts, or of objects with 'answer'."
        )
    return texts


SCORERS = {name: partial(score_vqa, task=name) for name in PROTOCOL_OF}
