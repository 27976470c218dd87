"""Samples for training, from files or the hub: which format they have, and what each row must hold.

    prompt     prompt, completion                the loss is on the completion
    messages   messages: [{role, content}, ...]  rendered by the tokenizer's chat template; the loss is on assistant turns
    instruction   instruction, output, input     a user turn (instruction, empty line, input where it has one) and an answer
    text       text                              the loss is on everything
    label      text or sentence (or a pair: text text2, sentence1 sentence2, question sentence), and label

`data.columns` maps our names to the file's: {prompt: question, completion: answer}.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..errors import ConfigError, WeftError
from ..tasks import GENERATION, IMAGES, GenerationTask, Task, files, find_generation, find_task
from ..tasks.generation import as_samples
from .config import DataSection

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
Row = dict[str, Any]


@dataclass(frozen=True)
class Samples:
    """Rows of one format, with our column names. `format` is never "auto", and instructions are
    messages by now; `source` is for what is said of them.
    """

    format: str
    rows: list[Row]
    source: str

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, places: Sequence[int]) -> Samples:
        return Samples(self.format, [self.rows[i] for i in places], self.source)


def check_source(name: str, key: str) -> None:
    """A file that exists and has a known ending, or a hub name, before anything is loaded. Raises
    ConfigError.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        raise ConfigError(
            f"{key}={name!r} is a folder; give a file ({', '.join(files.FORMATS)}) or a hub name."
        )
    if path.is_file():
        if not files.is_table(path):
            raise ConfigError(
                f"{key}={name!r}: of this file's name no format follows. Known: "
                f"{', '.join(files.FORMATS)} "
                "(and .gz)."
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
    """Training and evaluation samples. Raises WeftError, naming file, row and column."""
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
    places = list(range(len(samples)))
    random.Random(f"{seed}/eval_share").shuffle(places)
    held = max(1, round(share * len(places)))
    if held >= len(places):
        raise WeftError(
            f"data.eval_share={share:g} of {len(places)} samples leaves none to train on."
        )
    return samples.take(sorted(places[held:])), samples.take(sorted(places[:held]))


def _samples(name: str, section: DataSection, split: str, kind: str | None) -> Samples:
    rows = _renamed(_read(name, section.config, split), section.columns, name)
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
                f"data.columns.{ours}: this is no column of any format. Nearest: {', '.join(near)}."
            )
        if theirs not in rows[0]:
            near = get_close_matches(theirs, rows[0], n=2) or list(rows[0])
            raise WeftError(
                f"{name}: data.columns.{ours} names the column {theirs!r}, and there is none. "
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
        f"{name}: of the columns {', '.join(map(str, row))} no format follows. Name them with "
        "data.columns, for "
        "example {prompt: question, completion: answer}; formats need messages, prompt and "
        "completion, "
        "instruction and output, text, or text and label."
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
                raise WeftError(f"{where}: label={value!r} is no class and no number.")
        elif not isinstance(value, str):
            raise WeftError(f"{where}: {column}={value!r} is no text.")
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
        except ValueError:
            raise WeftError(f"{where}: messages is text and no JSON list.") from None
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


def _read(name: str, config: str | None, split: str) -> list[Row]:
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
    """A task of `weft.tasks`: training and validation samples, the task where its answers are text,
    the classes where it has some, and its notes. Validation samples of a text task are those of
    `generation.as_samples`.
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


def label_samples(task: Task, split: str) -> Samples:
    """A split of a labelled text task."""
    chosen = task.splits[split]
    return Samples(
        "label",
        [
            {
                "texts": tuple(text) if isinstance(text, tuple | list) else (text,),
                "label": task.classes[int(label)] if task.classes else label,
            }
            for text, label in zip(chosen.items, chosen.labels, strict=True)
        ],
        task.name,
    )


def check_task(name: str) -> None:
    """The name is known and its files exist. Raises ConfigError."""
    if is_generation(name):
        find_generation(name)
    else:
        find_task(name)


def is_image(name: str) -> bool:
    """A task whose samples are images, by its name."""
    return name.partition(":")[0] in (*IMAGES, "image-folder", "digits")


def is_generation(name: str) -> bool:
    """A task whose answers are text, by its name."""
    return name.partition(":")[0] in {family.partition(":")[0] for family in GENERATION}
