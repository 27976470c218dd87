"""Samples for training, from files, the hub or a task: their formats, and the columns of each.

    prompt        prompt, completion; the loss is on the completion
    messages      messages: [{role, content}, ...], rendered by the tokenizer's chat template; the
                  loss is on assistant turns
    instruction   instruction, output, and input if there is one: a user's turn and an answer
    text          text; the loss is on everything
    label         label, and text or sentence, or a pair: text text2, sentence1 sentence2,
                  question sentence

`tools` and `documents` beside a conversation go to the chat template; `system` and `history` come
before a prompt or an instruction as turns (records.py), and images go to a vision-language model
(record_images.py). `data.columns` maps Weft's names to the
file's: {prompt: question, completion: answer}. All other columns must be in `data.ignore`.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches

from ..encoding.conversation import conversation
from ..encoding.samples import Samples, is_generation, label_samples
from ..errors import ConfigError, WeftError
from ..tasks import GenerationTask, find_generation, find_task
from ..tasks.files import Row
from ..tasks.generation import as_samples
from .config.sections import LANGUAGE, DataSection
from .formats import COLUMNS, LABELLED, NEEDED, OPTIONAL
from .ignored import ignored_keys, keys_of, without_columns, without_keys
from .normalise import message_columns, normalised, opened, with_labels
from .record_images import with_images
from .records import EMPTY, chat_row, check_pairs, check_read, is_chat
from .sources import folder_of, read_source, title_of


def load_samples(
    section: DataSection, kind: str | None, seed: int, labels: Sequence[str] | None = None
) -> tuple[Samples, Samples | None]:
    """Returns training and evaluation samples. `labels` are the names of the classes, if given.

    Raises ConfigError or WeftError, naming the file, the row and the column.
    """
    if section.train is None:
        raise ConfigError("data.train is missing.")
    read = [_Read.of("train", section)]
    if section.eval is not None:
        read.append(_Read.of("eval", section))
    parts = [_samples(part, section, kind, labels) for part in _left_out(read, section)]
    train, held = parts[0], parts[1] if len(parts) > 1 else None
    if held is not None:
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


@dataclass(frozen=True)
class _Read:
    """The records of data.train or data.eval, and where each is from."""

    name: str
    rows: list[Row]
    places: list[str]

    @classmethod
    def of(cls, key: str, section: DataSection) -> _Read:
        """Raises ConfigError or WeftError, naming the file and the record."""
        given = getattr(section, key)
        name, split = title_of(given), section.split if key == "train" else section.eval_split
        read = read_source(given, f"data.{key}", section.config, split)
        check_pairs([row for _, row in read], section.ignore, name)
        return cls(name, [row for _, row in read], [place for place, _ in read])


def _left_out(parts: list[_Read], section: DataSection) -> list[_Read]:
    """The records with Weft's names of columns, without what data.ignore names. A name means the
    same in all files.
    """
    columns = {str(column) for part in parts for row in part.rows for column in row}
    named = [_with_names(part, section) for part in parts]
    holders = [message_columns(part.rows, section.columns) for part in named]
    named = [
        replace(part, rows=opened(part.rows, part.places, held, section.columns))
        for part, held in zip(named, holders, strict=True)
    ]
    if columns.issuperset(section.ignore):
        return named
    found = {
        key
        for part, held in zip(named, holders, strict=True)
        for row in part.rows
        for key in keys_of(row, held)
    }
    keys = ignored_keys(section.ignore, columns, found)
    return [
        replace(part, rows=[without_keys(row, held, keys) for row in part.rows])
        for part, held in zip(named, holders, strict=True)
    ]


def _with_names(part: _Read, section: DataSection) -> _Read:
    rows = without_columns(part.rows, section.ignore) if section.ignore else part.rows
    return replace(part, rows=_renamed(rows, section.columns, part.name))


def _samples(
    read: _Read, section: DataSection, kind: str | None, labels: Sequence[str] | None
) -> Samples:
    name, chats = read.name, section.format in ("auto", "messages")
    rows = normalised(read.rows, read.places, section.columns, chats)
    there = _filled(rows)
    if section.format == "auto":
        _check_records(rows, name)
    chosen = section.format if section.format != "auto" else _format_of(there, kind, name)
    wanted = _columns(chosen, there, name)
    check_read(rows, (*wanted, *OPTIONAL.get(chosen, ())), name, section.columns)
    if chosen == "label":
        at = f"column {section.columns.get('label', 'label')!r}"
        rows = with_labels(rows, [f"{place}, {at}" for place in read.places], kind, labels or ())
    checked = [
        _checked(row, chosen, wanted, f"{name}, sample {i}") for i, row in enumerate(rows, 1)
    ]
    if is_chat(rows, chosen):
        return Samples("messages", _chats(checked, chosen, read), name)
    return Samples(chosen, checked, name)


def _chats(rows: list[Row], chosen: str, read: _Read) -> list[Row]:
    """Records as conversations, with the pictures of those that have some. Raises WeftError."""
    chats = []
    for number, (row, place) in enumerate(zip(rows, read.places, strict=True), 1):
        where = f"{read.name}, sample {number}"
        made = with_images(chat_row(row, chosen, where), row, folder_of(place), where)
        conversation(made, where)  # raises
        chats.append(made)
    return chats


def _filled(rows: list[Row]) -> list[str]:
    """The columns of all records, without those that no record fills if the others fit a format:
    tables and data sets fill up what a record lacks.
    """
    columns = _columns_of(rows)
    filled = [
        column
        for column in columns
        if column == "label" or any(row.get(column) not in EMPTY for row in rows)
    ]
    groups = (*NEEDED.values(), *((*texts, "label") for texts in LABELLED))
    fits = any(all(column in filled for column in group) for group in groups)
    return filled if fits else columns


def _columns_of(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(column for row in rows for column in row))


def _renamed(rows: list[Row], columns: Mapping[str, str], name: str) -> list[Row]:
    """The rows with Weft's names in place of the file's."""
    there = _columns_of(rows) if columns else []
    for ours, theirs in columns.items():
        if ours not in COLUMNS:
            near = get_close_matches(ours, COLUMNS, n=2) or sorted(COLUMNS)
            raise ConfigError(
                f"data.columns.{ours}: no format has this column. Nearest: {', '.join(near)}."
            )
        if theirs not in there:
            near = get_close_matches(theirs, there, n=2) or there
            raise WeftError(
                f"{name}: data.columns.{ours} names the column {theirs!r}, which does not exist. "
                f"Nearest: {', '.join(near)}."
            )
        if ours in there and ours not in columns.values():
            raise WeftError(
                f"{name}: data.columns.{ours} puts {theirs!r} in the place of the column {ours!r}, "
                f"which exists too. If that one has no meaning, write data.ignore: [{ours}]."
            )
    if not columns:
        return rows
    return [
        {
            **{key: value for key, value in row.items() if key not in columns.values()},
            **{ours: row.get(theirs) for ours, theirs in columns.items()},
        }
        for row in rows
    ]


def _check_records(rows: list[Row], name: str) -> None:
    """Raises WeftError for one object that has the records in it: {"data": [{...}, ...]}."""
    lists = {
        column: value
        for column, value in rows[0].items()
        if column not in COLUMNS
        and isinstance(value, list)
        and value
        and all(isinstance(entry, Mapping) for entry in value)
    }
    if len(rows) == 1 and lists and not any(column in COLUMNS for column in rows[0]):
        column, held = next(iter(lists.items()))
        raise WeftError(
            f"{name}: it is one record, whose {column!r} is a list of {len(held)} objects. If these "
            "are the records, write that list alone as a .json, [{...}, {...}], or one object per "
            "line as a .jsonl; if they are messages, write data.columns: "
            f"{{messages: {column}}}."
        )


def _format_of(row: Sequence[str], kind: str | None, name: str) -> str:
    if (
        "label" in row
        and kind not in LANGUAGE
        and any(all(c in row for c in group) for group in LABELLED)
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


def _columns(chosen: str, row: Sequence[str], name: str) -> tuple[str, ...]:
    if chosen == "label":
        texts = next((group for group in LABELLED if all(c in row for c in group)), None)
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
    """The columns of the format, and the optional ones that are there, each of its type."""
    if chosen != "messages":
        for column in wanted:
            value = row.get(column)
            if column == "label":
                if value is None or value == "" or isinstance(value, bool | dict | list):
                    raise WeftError(f"{where}: label={value!r} is neither a class nor a number.")
            elif not isinstance(value, str):
                raise WeftError(f"{where}: {column}={value!r} is not text.")
    if not isinstance(row.get("input", ""), str | None) and "input" in OPTIONAL.get(chosen, ()):
        raise WeftError(f"{where}: input={row['input']!r:.60} is not text.")
    if chosen == "label":
        return {"texts": tuple(row[c] for c in wanted[:-1]), "label": row["label"]}
    more = [column for column in OPTIONAL.get(chosen, ()) if column in row]
    return {column: row.get(column) for column in (*wanted, *more)}


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
