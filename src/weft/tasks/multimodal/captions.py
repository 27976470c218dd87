"""Captions of images (COCO) and of clips (TVC, YC2C): BLEU, METEOR, ROUGE-L, CIDEr."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from ...errors import WeftError
from ..caption_scores import caption_scores
from ..generation import Report, Scores
from . import by_id


def score_coco(references: Path, outputs: Path) -> Report:
    """Scores `[{"image_id", "caption"}]` against COCO's annotations, or against the test part of
    Karpathy's dataset_coco.json. Raises WeftError.
    """
    given = by_id.read_json(references)
    wanted: dict[str, list[str]] = defaultdict(list)
    if (
        isinstance(given, dict)
        and isinstance(given.get("images"), list)
        and ("annotations" not in given)
    ):
        for number, row in enumerate(given["images"], 1):
            if by_id.value_of(references, number, row, ("split",)) == "test":
                name = str(by_id.value_of(references, number, row, ("cocoid", "imgid")))
                wanted[name] += [one["raw"] for one in row.get("sentences", ())]
    else:
        for number, row in enumerate(by_id.rows(references, ("annotations",)), 1):
            name = str(by_id.value_of(references, number, row, ("image_id",)))
            wanted[name].append(str(by_id.value_of(references, number, row, ("caption",))))
    found = by_id.by_id(outputs, by_id.rows(outputs), ("image_id",), ("caption",))
    ids = by_id.matched(references, wanted, outputs, found)
    texts = [by_id.text(outputs, name, found[name]) for name in ids]
    return caption_scores(texts, [wanted[name] for name in ids], bleu=True)


def score_clips(references: Path, outputs: Path) -> Report:
    """Scores JSON lines with `clip_id` and `descs`, in percent, as VALUE's tool does: characters
    that are not ASCII become spaces, all `descs` of a clip are its references, and the first of an
    output counts. Raises WeftError.
    """
    wanted = _clips(references)
    found = _clips(outputs)
    ids = by_id.matched(references, wanted, outputs, found)
    first = [found[name][0] for name in ids]
    report = caption_scores(first, [wanted[name] for name in ids], bleu=True)
    scores: Scores = {n: None if v is None else 100 * v for n, v in report.scores.items()}
    return Report(scores, report.reasons, (*report.notes, "Scores in percent."))


def _clips(path: Path) -> dict[str, list[str]]:
    read = by_id.by_id(path, by_id.rows(path), ("clip_id",), ("descs",))
    return {name: _texts(path, name, value) for name, value in read.items()}


def _texts(path: Path, name: str, value: Any) -> list[str]:
    listed = value if isinstance(value, list) else []
    found = [one.get("desc") if isinstance(one, dict) else None for one in listed]
    texts = [one for one in found if isinstance(one, str)]
    if not texts or len(texts) < len(listed):
        raise WeftError(
            f"{path}, id {name!r}: 'descs' is not a list of objects with a text 'desc'."
        )
    return ["".join(c if c.isascii() else " " for c in one) for one in texts]


SCORERS = {"coco-caption": score_coco, "tvc": score_clips, "yc2c": score_clips}
