"""Samples for training, from files, the hub or a task: their formats, and the columns of each.

    prompt        prompt, completion; the loss is on the completion
    messages      messages: [{role, content}, ...], rendered by the tokenizer's chat template; the
                  loss is on assistant turns
    instruction   instruction, output, and input if there is one: a user's turn and an answer
    text          text; the loss is on everything
    label         label, and text or sentence, or a pair: text text2, sentence1 sentence2,
                  question sentence

`data.columns` maps Weft's names to the file's: {prompt: question, completion: answer}.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..encoding.samples import Samples, is_generation, label_samples
from ..errors import ConfigError, WeftError
from ..tasks import GenerationTask, files, find_generation, find_task
from ..tasks.files import Row
from ..tasks.generation import as_samples
from .config.sections import DataSection

NEEDED = {
    "messages": ("messages",),
    "prompt": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "text": ("text",),
}
TEXTS = (
    ("sentence1", "sentence2"),
    ("text", "text2"),
    ("question", "sentence"),
    ("text",),
    ("sentence",),
)
ROLES = ("system", "user", "assistant", "tool", "developer")


def check_source(name: str, key: str) -> None:
    """Raises ConfigError unless `name` is an existing file of a known format or a hub name. Nothing
    is loaded.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        raise ConfigError(
            f"{key}={name!r} is a folder; give a file ({', '.join(files.FORMATS)}) or a hub name."
        )
    if path.is_file():
        if not files.is_table(path):
            raise ConfigError(
                f"{key}={name!r}: the file's name does not end in a known format: "
                f"{', '.join(files.FORMATS)} (and .gz)."
            )
    elif files.is_table(path) or not files.is_hub_name(name):
        near = get_close_matches(
            path.name, [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else [], n=2
        )
        raise ConfigError(
            f"{key}={name!r}: there is no such file."
            + (f" Nearest: {', '.join(near)}." if near else "")
        )


def load_samples(
    section: DataSection, kind: str | None, seed: int
) -> tuple[Samples, Samples | None]:
    """Returns training and evaluation samples.

    Raises ConfigError or WeftError, naming the file, the row and the column.
    """
    if section.train is None:
        raise ConfigError("data.train is missing.")
    train = _samples(section.train, section, section.split, kind)
    if section.eval is not None:
        held = _samples(section.eval, section, section.eval_split, kind)
        if held.format != train.format:
            raise WeftError(
                f"data.eval has the format {held.format!r} and data.train {train.format!r}."
            )
        return train, held
    if section.eval_share:
        return _divided(train, section.eval_share, seed)
    return train, None


def _divided(samples: Samples, share: float, seed: int) -> tuple[Samples, Samples]:
    order = list(range(len(samples)))
    random.Random(f"{seed}/eval_share").shuffle(order)
    count = max(1, round(share * len(order)))
    if count >= len(order):
        raise WeftError(
            f"data.eval_share={share:g} of {len(order)} samples leaves none to train on."
        )
    return samples.take(sorted(order[count:])), samples.take(sorted(order[:count]))


def _samples(name: str, section: DataSection, split: str, kind: str | None) -> Samples:
    rows = _renamed(_rows(name, section.config, split), section.columns, name)
    chosen = section.format if section.format != "auto" else _format_of(rows[0], kind, name)
    wanted = _columns(chosen, rows[0], name)
    checked = [
        _checked(row, chosen, wanted, f"{name}, sample {i}") for i, row in enumerate(rows, 1)
    ]
    return Samples("messages" if chosen == "instruction" else chosen, checked, name)


def _renamed(rows: list[Row], columns: Mapping[str, str], name: str) -> list[Row]:
    known = {*(c for group in (*NEEDED.values(), *TEXTS) for c in group), "label", "input"}
    for ours, theirs in columns.items():
        if ours not in known:
            near = get_close_matches(ours, known, n=2) or sorted(known)
            raise ConfigError(
                f"data.columns.{ours}: no format has this column. Nearest: {', '.join(near)}."
            )
        if theirs not in rows[0]:
            near = get_close_matches(theirs, rows[0], n=2) or list(rows[0])
            raise WeftError(
                f"{name}: data.columns.{ours} names the column {theirs!r}, which does not exist. "
                f"Nearest: {', '.join(near)}."
            )
    return (
        [{**row, **{ours: row.get(theirs) for ours, theirs in columns.items()}} for row in rows]
        if columns
        else rows
    )


def _format_of(row: Row, kind: str | None, name: str) -> str:
    if (
        "label" in row
        and kind != "causal-lm"
        and any(all(c in row for c in group) for group in TEXTS)
    ):
        return "label"
    for chosen, wanted in NEEDED.items():
        if all(column in row for column in wanted):
            return chosen
    raise WeftError(
        f"{name}: the columns {', '.join(map(str, row))} fit no format. Name them with "
        "data.columns, for example {prompt: question, completion: answer}; formats need messages, "
        "prompt and completion, instruction and output, text, or text and label."
    )


def _columns(chosen: str, row: Row, name: str) -> tuple[str, ...]:
    if chosen == "label":
        texts = next((group for group in TEXTS if all(c in row for c in group)), None)
        if texts is not None and "label" in row:
            return (*texts, "label")
        wanted: Sequence[str] = ("text", "label")
    else:
        wanted = NEEDED[chosen]
        if all(column in row for column in wanted):
            return tuple(wanted)
    raise WeftError(
        f"{name}: data.format={chosen} needs the columns {', '.join(wanted)}, and there are "
        f"{', '.join(map(str, row))}. Name them with data.columns."
    )


def _checked(row: Row, chosen: str, wanted: Sequence[str], where: str) -> Row:
    if chosen == "messages":
        return {"messages": _messages(row.get("messages"), where)}
    for column in wanted:
        value = row.get(column)
        if column == "label":
            if value is None or value == "" or isinstance(value, bool | dict | list):
                raise WeftError(f"{where}: label={value!r} is neither a class nor a number.")
        elif not isinstance(value, str):
            raise WeftError(f"{where}: {column}={value!r} is not text.")
    if chosen == "instruction":
        more = row.get("input")
        asked = row["instruction"] + (
            f"\n\n{more}" if isinstance(more, str) and more.strip() else ""
        )
        return {
            "messages": [
                {"role": "user", "content": asked},
                {"role": "assistant", "content": row["output"]},
            ]
        }
    if chosen == "label":
        return {"texts": tuple(row[c] for c in wanted[:-1]), "label": row["label"]}
    return {column: row[column] for column in wanted}


def _messages(value: Any, where: str) -> list[dict[str, Any]]:
    if isinstance(value, str) and value.startswith("["):  # a table's cell
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise WeftError(f"{where}: messages is text, but not a JSON list.") from None
    if not isinstance(value, list) or not value:
        raise WeftError(f"{where}: messages must be a list of {{role, content}}.")
    for message in value:
        if (
            not isinstance(message, dict)
            or not isinstance(message.get("role"), str)
            or "content" not in message
        ):
            raise WeftError(
                f"{where}: each message is a mapping with role and content, and this is "
                f"{message!r:.80}."
            )
        if message["role"] not in ROLES:
            near = get_close_matches(message["role"], ROLES, n=1) or ROLES
            raise WeftError(
                f"{where}: role {message['role']!r} is not known. Nearest: {', '.join(near)}."
            )
    if not any(message["role"] == "assistant" for message in value):
        raise WeftError(
            f"{where}: no message has the role assistant, so there is nothing to learn."
        )
    return value


def _rows(name: str, config: str | None, split: str) -> list[Row]:
    path = Path(name).expanduser()
    if path.is_file():
        return files.read_rows(path)
    rows = files.hub_rows(name, config, split)
    if rows is None:
        raise WeftError(
            f"data {name!r} has no split {split!r} on the hub; data.split and data.eval_split name "
            "it."
        )
    return rows


def load_task(
    name: str,
) -> tuple[Samples, Samples | None, GenerationTask | None, tuple[str, ...] | None, tuple[str, ...]]:
    """Loads a task of `weft.tasks`.

    Returns training and validation samples, the task if its answers are text, its classes if it has
    any, and its notes. The validation samples of a task with text answers are those of
    `generation.as_samples`. Raises ConfigError or WeftError.
    """
    if is_generation(name):
        task = find_generation(name).load()
        train = Samples("prompt", [dict(sample) for sample in task.train_samples()], name)
        held = None
        if task.records.get("validation"):
            held = Samples(
                "prompt",
                [dict(sample) for sample in as_samples(task.eval_records("validation"))],
                name,
            )
        return train, held, task, None, task.notes
    labelled = find_task(name).load()
    names = labelled.classes or None
    return (
        label_samples(labelled, "train"),
        label_samples(labelled, "validation"),
        None,
        names,
        labelled.notes,
    )
