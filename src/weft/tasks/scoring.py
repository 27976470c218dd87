"""`weft score`: a task's metric on a file of references and a file of outputs, without a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..errors import ConfigError, WeftError
from . import COMMONSENSE, GLUE
from .generation import Record, Report, references_only
from .multimodal import SCORERS, vqa
from .multimodal.answers import PROTOCOLS

__all__ = ["PROTOCOLS", "SCORED", "check_task", "score_files"]
Scorer = Callable[[Sequence[str], Sequence[Record]], Report]
SCORED = ("e2e", "samsum", "wikisql", *COMMONSENSE, *GLUE, *SCORERS)


def check_task(task: str) -> None:
    """Raises ConfigError with the nearest names if the task has no scorer."""
    if task not in SCORED:
        if task.partition(":")[0] == "mt-bench":
            raise ConfigError(
                "--task mt-bench is graded by another model: weft judge --questions FILE."
            )
        near = get_close_matches(task.partition(":")[0], SCORED, n=2) or list(SCORED)
        raise ConfigError(f"--task {task!r} has no scorer. Nearest: {', '.join(near)}.")


def score_files(task: str, references: Path, outputs: Path, protocol: str | None = None) -> Report:
    """Reads both files and scores. `protocol`: one of `PROTOCOLS`, for VQA tasks; None for the
    benchmark's own.

    Raises ConfigError if the task is not known or has no protocols, and WeftError if a line is
    invalid or the numbers differ.
    """
    check_task(task)
    if protocol is not None and task not in vqa.PROTOCOL_OF:
        raise ConfigError(
            f"--protocol is the rule of VQA accuracy ({', '.join(vqa.PROTOCOL_OF)}); {task} has none."
        )
    for path in (references, outputs):
        if not (path.is_file() or (task == "pope" and path.is_dir())):
            raise ConfigError(f"{path}: there is no such file.")
    if task in vqa.PROTOCOL_OF:
        return vqa.score_vqa(references, outputs, task, protocol)
    if task in SCORERS:
        return SCORERS[task](references, outputs)
    if task == "e2e":
        from .e2e import read_e2e_outputs, read_e2e_references, score_e2e

        groups, meanings = read_e2e_references(references)
        texts = read_e2e_outputs(outputs, meanings)
        _check_lengths(references, groups, outputs, texts)
        return score_e2e(texts, references_only(groups))
    if task in GLUE:
        from .glue import read_labels, score_glue

        labels = read_labels(references, task)
        predicted = read_labels(outputs, task, "prediction")
        _check_lengths(references, labels, outputs, predicted)
        return score_glue(predicted, labels, task)
    records, texts, scorer = _read_texts(task, references, outputs)
    _check_lengths(references, records, outputs, texts)
    return scorer(texts, records)


def _read_texts(
    task: str, references: Path, outputs: Path
) -> tuple[list[Record], list[str], Scorer]:
    if task == "wikisql":
        from .wikisql import read_wikisql_outputs, read_wikisql_references, score_wikisql

        records = read_wikisql_references(references)
        return records, read_wikisql_outputs(outputs, references), score_wikisql
    if task == "samsum":
        from .samsum import read_samsum_outputs, read_samsum_references, score_samsum

        return read_samsum_references(references), read_samsum_outputs(outputs), score_samsum
    from .commonsense import (
        read_commonsense_outputs,
        read_commonsense_references,
        score_commonsense,
    )

    records = read_commonsense_references(references)
    return records, read_commonsense_outputs(outputs), score_commonsense


def _check_lengths(references: Path, wanted: list[Any], outputs: Path, texts: list[Any]) -> None:
    if len(wanted) != len(texts):
        blank = 0
        while blank < len(texts) and texts[-1 - blank] == "":
            blank += 1
        hint = f" The last {blank} of the outputs are empty lines." if blank else ""
        raise WeftError(
            f"{outputs} has {len(texts)} outputs, and {references} has {len(wanted)} references to "
            f"compare them with; each output needs its own.{hint}"
        )
    if not wanted:
        raise WeftError(f"{references}: the file has nothing to score.")
