"""POPE: questions for objects that are in an image or not. Source: arXiv:2305.10355 and the scripts
of AoiDragon/POPE and LLaVA.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...errors import WeftError
from ..generation import Report, Scores
from . import by_id

_NO = {"No", "no", "not"}
PART = "coco_pope_"
_PARTS = ("random", "popular", "adversarial")


def says_yes(output: str) -> bool:
    """Returns False if the first sentence of an output has the word No, no or not, else True."""
    words = output.partition(".")[0].replace(",", "").split(" ")
    return not _NO & set(words)


def pope_scores(outputs: Sequence[str], labels: Sequence[bool]) -> Scores:
    """Returns accuracy, precision, recall, F1 and the share of "yes", each in [0, 1], for labels
    that are True for "yes". A ratio without a denominator is None.
    """
    found = [says_yes(output) for output in outputs]
    both = sum(a and b for a, b in zip(found, labels, strict=True))
    yes, wanted = sum(found), sum(labels)
    right = sum(a == b for a, b in zip(found, labels, strict=True))
    return {
        "accuracy": right / len(labels),
        "precision": both / yes if yes else None,
        "recall": both / wanted if wanted else None,
        "F1": 2 * both / (yes + wanted) if yes + wanted else None,
        "yes": yes / len(labels),
    }


def score_pope(references: Path, outputs: Path) -> Report:
    """Scores outputs (`question_id` and `text` or `answer`, JSON lines) against POPE's JSON lines
    with `question_id` and `label`. For the mean over the three parts, as in LLaVA's table,
    `references` is the folder with coco_pope_random.json and its siblings, and `outputs` a folder
    with the same names. Raises WeftError.
    """
    if not references.is_dir():
        return _report(_scores(references, outputs))
    scores: Scores = {}
    parts = [_scores(references / name, _beside(outputs, name)) for name in _names(references)]
    for metric in parts[0]:
        each = [one[metric] for one in parts]
        known = [value for value in each if value is not None]
        scores[metric] = sum(known) / len(each) if len(known) == len(each) else None
    for part, one in zip(_PARTS, parts, strict=True):
        scores |= {f"F1, {part}": one["F1"], f"accuracy, {part}": one["accuracy"]}
    return _report(scores, ("accuracy to yes: means over random, popular and adversarial.",))


def _report(scores: Scores, notes: tuple[str, ...] = ()) -> Report:
    why = 'there is no "yes" to divide by'
    return Report(scores, {name: why for name, value in scores.items() if value is None}, notes)


def _names(folder: Path) -> list[str]:
    names = [f"{PART}{part}.json" for part in _PARTS]
    missing = next((name for name in names if not (folder / name).is_file()), None)
    if missing is not None:
        raise WeftError(f"{folder}: there is no {missing}; all three parts belong to the score.")
    return names


def _beside(outputs: Path, name: str) -> Path:
    for found in (outputs / name, outputs / f"{name}l"):
        if found.is_file():
            return found
    raise WeftError(
        f"{outputs}: give a folder with outputs named {name} (or .jsonl), as the references are."
    )


def _scores(references: Path, outputs: Path) -> Scores:
    labels = by_id.by_id(references, by_id.rows(references), ("question_id",), ("label",))
    wrong = next((name for name, label in labels.items() if label not in ("yes", "no")), None)
    if wrong is not None:
        raise WeftError(
            f"{references}, id {wrong!r}: the label {labels[wrong]!r} is not yes or no."
        )
    found = by_id.by_id(outputs, by_id.rows(outputs), ("question_id",), ("text", "answer"))
    ids = by_id.matched(references, labels, outputs, found)
    texts = [by_id.text(outputs, name, found[name]) for name in ids]
    return pope_scores(texts, [labels[name] == "yes" for name in ids])


SCORERS = {"pope": score_pope}
