"""`weft score`: a task's metric on a file of references and a file of outputs, without a model."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..errors import ConfigError, WeftError
from . import COMMONSENSE, GLUE
from .generation import Report, references_only

SCORED = ("e2e", "samsum", "wikisql", *COMMONSENSE, *GLUE)


def check_task(task: str) -> None:
    """Raises ConfigError with the nearest names."""
    if task not in SCORED:
        if task.partition(":")[0] == "mt-bench":
            raise ConfigError(
                "--task mt-bench is judged by another model: weft judge --questions FILE."
            )
        near = get_close_matches(task.partition(":")[0], SCORED, n=2) or list(SCORED)
        raise ConfigError(f"--task {task!r} has no scorer. Nearest: {', '.join(near)}.")


def score_files(task: str, references: Path, outputs: Path) -> Report:
    """Read both and score. Raises ConfigError: an unknown task; WeftError: a line at fault, or
    unequal numbers of them.
    """
    check_task(task)
    for path in (references, outputs):
        if not path.is_file():
            raise ConfigError(f"{path}: there is no such file.")
    if task == "e2e":
        from . import e2e

        groups, meanings = e2e.read_references(references)
        texts = e2e.read_outputs(outputs, meanings)
        _equal(references, groups, outputs, texts)
        return e2e.score(texts, references_only(groups))
    if task in GLUE:
        from . import glue

        labels = glue.read_labels(references, task)
        predicted = glue.read_labels(outputs, task, "prediction")
        _equal(references, labels, outputs, predicted)
        return glue.score(predicted, labels, task)
    from . import commonsense, samsum, wikisql

    if task == "wikisql":
        records, texts = (
            wikisql.read_references(references),
            wikisql.read_outputs(outputs, references),
        )
    else:
        family: Any = samsum if task == "samsum" else commonsense
        records, texts = family.read_references(references), family.read_outputs(outputs)
    _equal(references, records, outputs, texts)
    scorer = {"wikisql": wikisql.score, "samsum": samsum.score}.get(task, commonsense.score)
    return scorer(texts, records)


def _equal(references: Path, wanted: list[Any], outputs: Path, found: list[Any]) -> None:
    if len(wanted) != len(found):
        blank = 0
        while blank < len(found) and found[-1 - blank] == "":
            blank += 1
        hint = f" The last {blank} of the outputs are empty lines." if blank else ""
        raise WeftError(
            f"{outputs} has {len(found)} outputs, and {references} has {len(wanted)} references to "
            "compare them "
            f"with; each output needs its own.{hint}"
        )
    if not wanted:
        raise WeftError(f"{references}: there is nothing to score in it.")
