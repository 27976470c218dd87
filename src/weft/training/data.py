"""Samples for training, from files or the hub: which format they have, and what each row must hold.

    prompt     prompt, completion                the loss is on the completion
    messages   messages: [{role, content}, ...]  rendered by the tokenizer's chat template; the loss is on assistant turns
    text       text                              the loss is on everything
    label      text or sentence (or a pair: text text2, sentence1 sentence2, question sentence), and label

`data.columns` maps our names to the file's: {prompt: question, completion: answer}.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..errors import ConfigError, WeftError
from .config import DataSection

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
NEEDED = {"messages": ("messages",), "prompt": ("prompt", "completion"), "text": ("text",)}
TEXTS = (("sentence1", "sentence2"), ("text", "text2"), ("question", "sentence"), ("text",), ("sentence",))
ROLES = ("system", "user", "assistant", "tool", "developer")
Row = dict[str, Any]


@dataclass(frozen=True)
class Samples:
    """Rows of one format, with our column names. `format` is none of "auto"; `source` is for messages."""

    format: str
    rows: list[Row]
    source: str

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, places: Sequence[int]) -> Samples:
        return Samples(self.format, [self.rows[i] for i in places], self.source)


def check_source(name: str, key: str) -> None:
    """A file that exists and has a known ending, or a hub name, before anything is loaded. Raises ConfigError."""
    path = Path(name).expanduser()
    if path.is_dir():
        raise ConfigError(f"{key}={name!r} is a folder; give a file ({', '.join(SUFFIXES)}) or a hub name.")
    if path.is_file():
        if _suffix(path) not in SUFFIXES:
            raise ConfigError(f"{key}={name!r}: of this file's name no format follows. Known: {', '.join(SUFFIXES)} "
                              "(and .gz).")
    elif _suffix(path) in SUFFIXES or name.startswith((".", "/", "~")) or name.count("/") > 1:
        near = get_close_matches(path.name, [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else [], n=2)
        raise ConfigError(f"{key}={name!r}: there is no such file." + (f" Nearest: {', '.join(near)}." if near else ""))


def load_samples(section: DataSection, kind: str | None, seed: int) -> tuple[Samples, Samples | None]:
    """Training and evaluation samples. Raises WeftError, naming file, row and column."""
    if section.train is None:
        raise ConfigError("data.train is missing.")
    train = _samples(section.train, section, section.split, kind)
    if section.eval is not None:
        held = _samples(section.eval, section, section.eval_split, kind)
        if held.format != train.format:
            raise WeftError(f"data.eval has the format {held.format!r} and data.train {train.format!r}.")
        return train, held
    if section.eval_share:
        return _divided(train, section.eval_share, seed)
    return train, None


def _divided(samples: Samples, share: float, seed: int) -> tuple[Samples, Samples]:
    places = list(range(len(samples)))
    random.Random(f"{seed}/eval_share").shuffle(places)
    held = max(1, round(share * len(places)))
    if held >= len(places):
        raise WeftError(f"data.eval_share={share:g} of {len(places)} samples leaves none to train on.")
    return samples.take(sorted(places[held:])), samples.take(sorted(places[:held]))


def _samples(name: str, section: DataSection, split: str, kind: str | None) -> Samples:
    rows = _read(name, section.config, split)
    if not rows:
        raise WeftError(f"{name}: it holds no sample.")
    rows = _renamed(rows, section.columns, name)
    chosen = section.format if section.format != "auto" else _format_of(rows[0], kind, name)
    wanted = _columns(chosen, rows[0], name)
    return Samples(chosen, [_checked(row, chosen, wanted, f"{name}, sample {i}") for i, row in enumerate(rows, 1)], name)


def _renamed(rows: list[Row], columns: Mapping[str, str], name: str) -> list[Row]:
    known = {*(c for group in (*NEEDED.values(), *TEXTS) for c in group), "label"}
    for ours, theirs in columns.items():
        if ours not in known:
            near = get_close_matches(ours, known, n=2) or sorted(known)
            raise ConfigError(f"data.columns.{ours}: this is no column of any format. Nearest: {', '.join(near)}.")
        if theirs not in rows[0]:
            near = get_close_matches(theirs, rows[0], n=2) or list(rows[0])
            raise WeftError(f"{name}: data.columns.{ours} names the column {theirs!r}, and there is none. "
                            f"Nearest: {', '.join(near)}.")
    return [{**row, **{ours: row.get(theirs) for ours, theirs in columns.items()}} for row in rows] if columns else rows


def _format_of(row: Row, kind: str | None, name: str) -> str:
    if "label" in row and kind != "causal-lm" and any(all(c in row for c in group) for group in TEXTS):
        return "label"
    for chosen in ("messages", "prompt", "text"):
        if all(column in row for column in NEEDED[chosen]):
            return chosen
    raise WeftError(f"{name}: of the columns {', '.join(map(str, row))} no format follows. Name them with data.columns, for "
                    "example {prompt: question, completion: answer}; formats need prompt and completion, messages, text, "
                    "or text and label.")


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
    raise WeftError(f"{name}: data.format={chosen} needs the columns {', '.join(wanted)}, and there are "
                    f"{', '.join(map(str, row))}. Name them with data.columns.")


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
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
            raise WeftError(f"{where}: each message is a mapping with role and content, and this is {message!r:.80}.")
        if message["role"] not in ROLES:
            near = get_close_matches(message["role"], ROLES, n=1) or ROLES
            raise WeftError(f"{where}: role {message['role']!r} is not known. Nearest: {', '.join(near)}.")
    if not any(message["role"] == "assistant" for message in value):
        raise WeftError(f"{where}: no message has the role assistant, so there is nothing to learn.")
    return value


def _read(name: str, config: str | None, split: str) -> list[Row]:
    path = Path(name).expanduser()
    if not path.is_file():
        return _from_hub(name, config, split)
    suffix = _suffix(path)
    if suffix == ".parquet":
        from pyarrow import parquet

        try:
            rows: list[Row] = parquet.read_table(path).to_pylist()
        except (OSError, ValueError) as error:
            raise WeftError(f"{name} is no readable parquet file: {' '.join(str(error).split())}") from None
        return rows
    try:
        held = path.read_bytes()
        text = (gzip.decompress(held) if path.suffix == ".gz" else held).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError, EOFError) as error:
        raise WeftError(f"{name} cannot be read as UTF-8 text: {error}") from None
    return _from_json(text, name, suffix == ".jsonl") if suffix in (".jsonl", ".json") else _from_table(text, name, suffix)


def _suffix(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


def _from_json(text: str, name: str, lines: bool) -> list[Row]:
    place = name
    try:
        if not lines:
            rows = json.loads(text)
        else:
            rows = []
            for number, line in enumerate(text.split("\n"), 1):
                place = f"{name}, line {number}"
                if line.strip():
                    rows.append(json.loads(line))
    except ValueError as error:
        raise WeftError(f"{place} is no JSON: {error}") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise WeftError(f"{name}: every {'line' if lines else 'element of the list'} must be an object.")
    return rows


def _from_table(text: str, name: str, suffix: str) -> list[Row]:
    """A header and rows; a .tsv is split at tabs and never unquoted."""
    tabs = suffix == ".tsv"
    stream = io.StringIO(text, newline="")
    reader = csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE) if tabs else csv.reader(stream)
    try:
        rows = [(reader.line_num, row) for row in reader if row]
    except csv.Error as error:
        raise WeftError(f"{name}, line {reader.line_num}: {error}") from None
    header = [column.strip() for column in rows[0][1]] if rows else []
    for line, row in rows[1:]:
        if len(row) != len(header):
            raise WeftError(f"{name}, line {line}: {len(row)} fields, and the header has {len(header)}.")
    return [dict(zip(header, row, strict=True)) for _, row in rows[1:]]


def _from_hub(name: str, config: str | None, split: str) -> list[Row]:
    import datasets

    try:
        return [dict(row) for row in datasets.load_dataset(name, config, split=split)]
    except Exception as error:  # datasets raises its own, OSError, ValueError, and more
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise WeftError(f"data {name!r} is no file here and could not be had from the hub (split {split!r}): {first}"
                        ) from error
