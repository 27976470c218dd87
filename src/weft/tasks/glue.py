"""GLUE (arXiv:1804.07461): SST-2, MRPC, CoLA, QNLI, RTE, STS-B and MNLI-m, for sequence
classification models.

`sst2:DIR` and so on read train and dev of the benchmark's folders (tsv without quoting, CoLA's
without a header), or the same rows as csv, jsonl or parquet; `sst2` alone is the hub's glue/sst2.
There are two protocols:

sst2:DIR         validation is 10 % of train, by class and a fixed seed; test is dev: one is for choices, the other reported
sst2-paper:DIR   validation and test are both dev: the papers report the best epoch on the data that choose it, which is
                 optimistic; a note in every report says this

A folder with only one labelled file is split 60/20/20. GLUE's own test files have no labels and are
not read. MRPC's original test file has labels and is used if there is no dev.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import WeftError
from .base import SHARES, SPLITS, Split, Task, divide, stratified
from .files import Row, columns, find_file, format_of, hub_rows, is_table, read_lines, read_rows
from .generation import Report, Scores
from .metrics import METRICS, NO_VARIATION

HUB = "nyu-mll/glue"
PAPER = "-paper"
VALIDATION = 0.1  # share of train
LABELS = ("label", "gold_label", "score", "Quality")
COLA_HEADER = ("source", "label", "mark", "sentence")


@dataclass(frozen=True)
class Glue:
    """One data set. `classes` are names in the order of their numbers, () for a regression. `texts`
    are possible column names.
    """

    texts: tuple[tuple[str, ...], ...]
    classes: tuple[str, ...]
    metrics: tuple[str, ...]  # the first one is compared
    dev: tuple[str, ...] = ("dev", "validation")


_PAIR = ("sentence1", "sentence2")
SETS = {
    "sst2": Glue((("sentence",),), ("negative", "positive"), ("accuracy",)),
    "mrpc": Glue(
        (_PAIR, ("#1 String", "#2 String")),
        ("not_equivalent", "equivalent"),
        ("accuracy", "F1"),
        ("dev", "validation", "test"),
    ),
    "cola": Glue((("sentence",),), ("unacceptable", "acceptable"), ("Matthews",)),
    "qnli": Glue((("question", "sentence"),), ("entailment", "not_entailment"), ("accuracy",)),
    "rte": Glue((_PAIR,), ("entailment", "not_entailment"), ("accuracy",)),
    "stsb": Glue((_PAIR,), (), ("Pearson", "Spearman")),
    "mnli": Glue(
        (_PAIR, ("premise", "hypothesis")),
        ("entailment", "neutral", "contradiction"),
        ("accuracy",),
        ("dev_matched", "validation_matched"),
    ),
}


def load_glue(source: Path | None, name: str) -> Task:
    """Loads a data set. `name` is one of SETS, with "-paper" for the papers' protocol; `source` is
    a folder, or None for the hub.

    Raises WeftError if train or dev is missing, if a row has no text or label, or if a label is not
    a class.
    """
    known = SETS[name.removesuffix(PAPER)]
    where = f"{name}:{source}" if source is not None else name
    train, dev = (
        _read_part(source, name.removesuffix(PAPER), known, stems)
        for stems in (("train",), known.dev)
    )
    if train is None and dev is None:
        raise WeftError(f"{where}: neither train nor {known.dev[0]} exists.")
    if train is None or dev is None:
        return _one_file(where, known, train or dev, name.endswith(PAPER))  # type: ignore[arg-type]
    if name.endswith(PAPER):
        splits = {"train": train, "validation": dev, "test": dev}
        note = (
            "validation and test are both dev, as in the papers; choices and reported scores use "
            "the same data, which is optimistic"
        )
    else:
        rest, held = _held_out(train, known)
        splits = {"train": train.take(rest), "validation": train.take(held), "test": dev}
        note = f"validation is {VALIDATION:.0%} of train, by class and by a fixed seed; test is dev"
    return Task(where, "text", known.classes, splits, (f"{where}: {note}.",), known.metrics[0])


def _held_out(train: Split, known: Glue) -> list[list[int]]:
    """Rows for training and rows for validation. A regression is stratified by rounded scores."""
    groups = (
        [int(label) for label in train.labels]
        if known.classes
        else [math.floor(label) for label in train.labels]
    )
    small = min(groups.count(group) for group in set(groups))
    if small < 2:
        raise WeftError(
            f"a class with {small} training example cannot be split into train and validation."
        )
    return stratified(groups, (1 - VALIDATION, VALIDATION))


def _one_file(where: str, known: Glue, split: Split, paper: bool) -> Task:
    if paper:
        raise WeftError(
            f"{where}: the papers' protocol trains on train and reports dev, and only one of them "
            "exists."
        )
    if not known.classes:
        parts = stratified([math.floor(label) for label in split.labels], SHARES)
        splits = {name: split.take(rows) for name, rows in zip(SPLITS, parts, strict=True)}
        notes = [
            (
                f"{where}: train, validation and test are 60, 20 and 20 % of the one file, by a "
                "fixed "
                "seed."
            )
        ]
        return Task(where, "text", (), splits, tuple(notes), known.metrics[0])
    _, splits, notes = divide(where, split.items, [str(label) for label in split.labels], None)
    return Task(where, "text", known.classes, splits, tuple(notes), known.metrics[0])


def _read_part(source: Path | None, name: str, known: Glue, stems: Sequence[str]) -> Split | None:
    if source is None:
        for stem in stems:
            rows = hub_rows(HUB, name, stem)
            if rows:
                return _split(rows, known, f"{HUB}, {name}, {stem}")
        return None
    path = find_file(source, stems)
    if path is None:
        return None
    header = (
        COLA_HEADER
        if name == "cola" and format_of(path) == ".tsv" and not _has_header(path)
        else ()
    )
    return _split(read_rows(path, header), known, str(path))


def _has_header(path: Path) -> bool:
    return "sentence" in read_lines(path)[0].split("\t")


def _split(rows: Sequence[Row], known: Glue, where: str) -> Split:
    texts = next(
        (names for names in known.texts if all(name in rows[0] for name in names)), known.texts[0]
    )
    label = next((name for name in LABELS if name in rows[0]), LABELS[0])
    columns(rows, where, *texts, label)
    items = [tuple(str(row[name]).strip() for name in texts) for row in rows]
    return Split(
        items,
        [_label(row[label], known, f"{where}, row {i}") for i, row in enumerate(rows, start=1)],
    )


def _label(value: Any, known: Glue, where: str) -> float:
    """A class number from its number or name; the score itself in a regression."""
    text = str(value).strip()
    if not known.classes:
        try:
            score = float(text)
        except ValueError:
            score = math.nan
        if not math.isfinite(score):
            raise WeftError(f"{where}: the score {text[:40]!r} is not a number.")
        return score
    if text in known.classes:
        return known.classes.index(text)
    if text.isdigit() and int(text) < len(known.classes):
        return int(text)
    raise WeftError(
        f"{where}: the label {text[:40]!r} is not one of {list(known.classes)} or their numbers "
        "from 0."
    )


def score_glue(predicted: Sequence[float], labels: Sequence[float], name: str) -> Report:
    """Returns the data set's metrics as fractions. A correlation with a constant is None, with the
    reason.
    """
    scores: Scores = {metric: METRICS[metric](predicted, labels) for metric in SETS[name].metrics}
    return Report(
        scores, {metric: NO_VARIATION for metric, value in scores.items() if value is None}
    )


def read_labels(path: Path, name: str, column: str | None = None) -> list[float]:
    """Reads one label per line, as number or name, or the label column of a table (GLUE's
    submissions: prediction).

    Raises WeftError with the invalid line or row.
    """
    known = SETS[name]
    if not is_table(path):
        return [
            _label(line, known, f"{path}, line {i}")
            for i, line in enumerate(read_lines(path), start=1)
        ]
    rows = read_rows(path)
    found = next(
        (one for one in (*((column,) if column else ()), *LABELS) if one in rows[0]),
        column or LABELS[0],
    )
    columns(rows, str(path), found)
    return [_label(row[found], known, f"{path}, row {i}") for i, row in enumerate(rows, start=1)]
