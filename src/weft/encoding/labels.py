"""Texts with a class or a score to tokens."""

from __future__ import annotations

import re
from array import array
from collections.abc import Sequence
from typing import Any

from ..errors import WeftError
from .rows import Counts, EncodedRows
from .samples import Samples
from .tokenizer import has_unknown


def encode_labels(
    samples: Samples, tokenizer: Any, max_length: int, classes: Sequence[str] | None
) -> EncodedRows:
    """Encodes samples for classification (labels become indices into `classes`) or, if classes is
    None, for regression (labels become numbers).

    Raises WeftError, naming the sample, if its label is not a class or not a number.
    """
    index = {name: i for i, name in enumerate(classes or ())}
    rows, counts = [], Counts(len(samples))
    for number, row in enumerate(samples.rows):
        where = samples.name_of(number)
        coded = tokenizer(*row["texts"], truncation=True, max_length=max_length)
        value: Any
        if classes is None:
            value = _as_score(row["label"], where)
        elif str(row["label"]) in index:
            value = index[str(row["label"])]
        else:
            raise WeftError(
                f"{where}: label {row['label']!r} is none of the {len(index)} classes "
                f"{list(index)[:8]}."
            )
        encoded = {"input_ids": array("i", coded["input_ids"]), "labels": value}
        if "token_type_ids" in coded:
            encoded["token_type_ids"] = array("i", coded["token_type_ids"])
        rows.append(encoded)
        counts.unknown += has_unknown(tokenizer, coded["input_ids"], row["texts"])
        counts.cut += (
            len(coded["input_ids"]) >= max_length
            and len(tokenizer(*row["texts"])["input_ids"]) > max_length
        )
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()  # a tokenizer keeps it, and is saved with it
    return EncodedRows(rows, counts)


def classes_of(samples: Samples) -> tuple[str, ...]:
    """Returns the labels that occur, sorted, as numbers if all are whole numbers.

    Raises WeftError if there is one class only: nothing could be learned, and a model with one
    output is a regression.
    """
    names = {str(row["label"]) for row in samples.rows}
    if len(names) < 2:
        raise WeftError(
            f"{samples.source}: all labels are {next(iter(names), '')!r}. A classification needs two "
            "classes at least; model.labels lists classes that these samples do not have."
        )
    whole = all(re.fullmatch(r"-?\d+", name) for name in names)
    return tuple(sorted(names, key=int) if whole else sorted(names))


def _as_score(value: Any, where: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise WeftError(
            f"{where}: label {value!r} is not a number, and model.kind is regression."
        ) from None
