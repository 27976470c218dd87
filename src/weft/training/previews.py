"""`weft train --preview`: the first samples as the model reads them."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ..encoding.marks import marked
from ..encoding.rows import IGNORED
from .config.sections import RunConfig
from .prepare import Data, find_sources, open_data

PROBLEMS = (
    ("cut", "cut off"),
    ("end_cut", "end-of-turn cut off"),
    ("end_masked", "end-of-turn masked"),
    ("end_missing", "no end-of-turn"),
    ("empty", "nothing in the loss"),
    ("blank", "blank answer"),
)


def preview(config: RunConfig, count: int = 3) -> str:
    """Returns the first `count` samples as the model reads them, with the tokens in the loss
    between ⟦ and ⟧, what the chat template added to the loss by itself and borders that were moved,
    and the counts of problems.

    Loads the tokenizer and the data, but no weights. Raises ConfigError or WeftError.
    """
    data = open_data(config, find_sources(config))
    shown = range(min(count, len(data.train)))
    parts = [f"sample {i + 1} of {len(data.train)}: {_sample_text(data, i)}\n" for i in shown]
    counts: Mapping[str, int] = vars(data.train.counts)
    problems = ", ".join(f"{text} {counts[key]}" for key, text in PROBLEMS)
    parts.append(f"{counts['samples']} samples ({data.format}); {problems}")
    return "\n".join(parts + data.notes)


def _repeated(match: re.Match[str]) -> str:
    """The tokens of a picture, which are all the same."""
    return f"{match[1]} x {len(match[0]) // len(match[1])}"


def _sample_text(data: Data, index: int) -> str:
    row = data.train[index]
    if "pixel_values" in row:
        label = (data.classes or ())[row["labels"]]
        return f"pixels {list(row['pixel_values'].shape)}, label {label}"
    ids, labels = row["input_ids"], row["labels"]
    if isinstance(labels, int | float):
        label = data.classes[int(labels)] if data.classes else labels
        return f"{len(ids)} tokens, label {label}\n{data.tokenizer.decode(list(ids))}"
    in_loss = sum(label != IGNORED for label in labels)
    shown = marked(data.tokenizer, ids, labels)
    for word in () if data.processor is None else data.processor.reserved:
        shown = re.sub(f"({re.escape(word)}){{3,}}", _repeated, shown)
    text = f"{len(ids)} tokens, {in_loss} in the loss\n{shown}"
    return "\n".join([text, *(f"note: {remark}" for remark in row.get("remarks", ()))])
