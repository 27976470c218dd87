"""`csv:FILE`: text classification from a table with a header. A `.tsv` is split at tabs and never
unquoted.

The label is the column `label`. The text is `text` or `sentence`, or a pair: `text` and `text2`,
`sentence1` and `sentence2`, or `question` and `sentence`. A name that ends in .gz is decompressed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import WeftError
from .base import Split, Task, WithLabels, data_digest, divide
from .class_labels import classes, has_fractions
from .tables import check_unquoted, table

COLUMNS = (
    ("sentence1", "sentence2"),
    ("text1", "text2"),
    ("text", "text2"),
    ("question", "sentence"),
    ("text", None),
    ("sentence", None),
)
MAX_TOKENS = 128


def load_csv(path: Path, test: Path | None) -> Task:
    """Reads the table. `test` is a second table with the same columns, or None to hold out a part.

    Raises WeftError if the header has no label or text, if a row lacks one of them, or if the file
    is empty.
    """
    where = f"csv:{path}"
    texts, labels = _read_table(path)
    held = None if test is None else _read_table(test)
    classes, splits, notes = divide(where, texts, labels, held)
    train = set(splits["train"].items)
    shared = sum(text in train for text in splits["test"].items)
    if shared:
        notes.append(
            f"{where}: {shared} of {len(splits['test'])} test texts are in the training split too."
        )
    return Task(where, "text", classes, splits, tuple(notes))


def _read_table(path: Path) -> tuple[list[tuple[str, ...]], list[str]]:
    """Returns texts as tuples of one or two strings, and the labels as written."""
    header, rows = table(path)
    check_unquoted(path, header, rows)
    pair = next((p for p in COLUMNS if all(c is None or c in header for c in p)), None)
    if "label" not in header or pair is None:
        raise WeftError(
            f"{path}: the header is {header}. It needs the column 'label', and 'text' or "
            "'sentence' (or a "
            "pair: 'sentence1' and 'sentence2', 'text' and 'text2', 'question' and 'sentence')."
        )
    places = [header.index(column) for column in pair if column is not None]
    texts, labels, at = [], [], []
    for line, row in rows:
        text = tuple(row[place].strip() for place in places) if len(row) == len(header) else ()
        label = row[header.index("label")].strip() if text else ""
        if not label or not all(text):
            raise WeftError(
                f"{path}, line {line}: {len(row)} fields {[field[:30] for field in row][:6]}, but "
                "the header "
                f"has {len(header)}, and neither text nor label may be empty."
            )
        texts.append(text)
        labels.append(label)
        at.append(f"{path}, line {line}, column 'label'")
    if not texts:
        raise WeftError(f"{path}: it has a header but no rows.")
    names = classes(labels, at)
    if has_fractions(names):
        raise WeftError(
            f"{path}: labels such as {names[0]!r} are no classes; csv:FILE is a classification, and "
            "weft train with model.kind: regression learns numbers."
        )
    return texts, names


@dataclass(frozen=True)
class TextSplit(WithLabels):
    """Token ids of every example, unpadded. A batch is padded on the right to its longest row."""

    rows: list[dict[str, list[int]]]
    pad: int

    def batch(self, rows: Tensor) -> dict[str, Tensor]:
        """Returns the tokenizer's fields for these rows [n], each [n, length of the longest]."""
        chosen = [self.rows[i] for i in rows.tolist()]
        longest = max(len(row["input_ids"]) for row in chosen)
        fill = {"input_ids": self.pad, "attention_mask": 0, "token_type_ids": 0}
        return {
            key: torch.tensor(
                [row[key] + [fill[key]] * (longest - len(row[key])) for row in chosen]
            )
            for key in chosen[0]
        }

    @cached_property
    def _fingerprint(self) -> str:
        flat = [token for row in self.rows for key in sorted(row) for token in (-1, *row[key])]
        return data_digest(self.labels, torch.tensor(flat))

    def fingerprint(self) -> str:
        return self._fingerprint


def encode_texts(split: Split, tokenizer: Any, limit: int, pad: int) -> TextSplit:
    """Encodes a split for one model, truncated to at most `limit` tokens per row."""
    columns = [list(column) for column in zip(*split.items, strict=True)]
    coded = tokenizer(*columns, truncation=True, max_length=limit, padding=False)
    keys = [key for key in ("input_ids", "attention_mask", "token_type_ids") if key in coded]
    rows = [{key: list(coded[key][i]) for key in keys} for i in range(len(split))]
    scores = any(isinstance(label, float) for label in split.labels)
    return TextSplit(
        torch.tensor(split.labels, dtype=torch.float32 if scores else torch.int64), rows, pad
    )
