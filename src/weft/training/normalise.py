"""Records of other conventions as Weft's own, before anything else looks at them.

    conversations: [{from: human, value: …}]      ShareGPT      -> messages: [{role: user, content: …}]
    prompt, completion: [{role, content}]         TRL           -> messages; what the prompt holds is not in the loss
    a number or true in a text column                           -> text as JSON writes it: 4 is "4", true is "true"
    label                                                       -> tasks/class_labels.py

A message keeps its other keys. What cannot be one of these is left as it is, for the checks after.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

from ..encoding.conversation import json_value
from ..errors import WeftError
from ..tasks import class_labels
from ..tasks.files import Numbered, Row
from .config.sections import DataSection
from .formats import TEXTS

SHAREGPT = ("conversations", "conversation")
_OURS = ("from", "value", "role", "content")
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
}


def normalised(rows: Sequence[Numbered], section: DataSection) -> tuple[list[Row], DataSection]:
    """Returns the records, and the section without the columns that they no longer have.

    `section` names columns and what to ignore. Raises WeftError, which names file, line and column.
    """
    file_name = dict(section.columns)
    found = [row for _, row in rows]
    places = [place for place, _ in rows]
    texts = [file_name.get(name, name) for name in TEXTS]
    texts = [name for name in texts if name not in section.ignore]
    found = [_texts(row, texts, place) for row, place in zip(found, places, strict=True)]
    found = _conversations(found, places, file_name.get("messages"), section.ignore)
    prompt, completion = (file_name.get(name, name) for name in ("prompt", "completion"))
    if _is_conversational(found, prompt, section.ignore):
        found = _joined(found, places, prompt, completion)
        file_name = {k: v for k, v in file_name.items() if k not in ("prompt", "completion")}
        section = replace(section, columns=file_name)
    return found, section


def _texts(row: Row, columns: Collection[str], place: str) -> Row:
    changed = {}
    for name in columns:
        value = row.get(name)
        if isinstance(value, bool | int | float):
            if isinstance(value, float) and not math.isfinite(value):
                raise WeftError(
                    f"{place}, column {name!r}: {value} is a missing value, and text is expected. "
                    "Remove the record."
                )
            changed[name] = json.dumps(value)
    return {**row, **changed} if changed else row


def _conversations(
    rows: list[Row], places: Sequence[str], mapped: str | None, ignored: Collection[str]
) -> list[Row]:
    """ShareGPT's lists as messages."""
    names = () if _filled(rows, "messages") else SHAREGPT
    column = mapped or next((name for name in names if _filled(rows, name)), "messages")
    if column not in rows[0] or column in ignored:
        return rows
    ours = column if mapped else "messages"
    out = []
    for row, place in zip(rows, places, strict=True):
        where = f"{place}, column {column!r}"
        value = row.get(column)
        if isinstance(value, str) and value.lstrip().startswith("["):  # a table's cell
            value = json_value(value, where)
        if isinstance(value, list) and any(_is_sharegpt(message) for message in value):
            value = [_message(message, where, n) for n, message in enumerate(value, 1)]
        rest = {key: held for key, held in row.items() if key not in (column, ours)}
        out.append({**rest, ours: value} if column in row else row)
    return out


def _filled(rows: Sequence[Row], column: str) -> bool:
    return any(row.get(column) not in (None, "") for row in rows)


def _is_sharegpt(message: Any) -> bool:
    """A table fills up what a message lacks with None."""
    return isinstance(message, Mapping) and "from" in message and message.get("role") is None


def _message(message: Any, where: str, number: int) -> dict[str, Any]:
    if not _is_sharegpt(message) or "value" not in message:
        raise WeftError(
            f"{where}, message {number}: {message!r:.60} has no from and value, as other messages "
            "have."
        )
    if message.get("content") is not None:
        raise WeftError(f"{where}, message {number}: it has both value and content.")
    said = message["from"]
    role = ROLES.get(said.strip().lower()) if isinstance(said, str) else None
    if role is None:
        near = get_close_matches(str(said), ROLES, n=2) or sorted(ROLES)
        raise WeftError(
            f"{where}, message {number}: nobody is called {said!r:.40} (from). Nearest: "
            f"{', '.join(near)}."
        )
    rest = {key: held for key, held in message.items() if key not in _OURS}
    return {"role": role, "content": message["value"], **rest}


def _is_conversational(rows: list[Row], prompt: str, ignored: Collection[str]) -> bool:
    return (
        prompt not in ignored
        and not _filled(rows, "messages")
        and any(_is_list(row.get(prompt)) for row in rows)
    )


def _joined(rows: list[Row], places: Sequence[str], prompt: str, completion: str) -> list[Row]:
    """Prompts and completions that are lists of messages, as one conversation each. Only the
    completion's answers are in the loss, as in TRL.
    """
    out = []
    for row, place in zip(rows, places, strict=True):
        asked = _turns(row.get(prompt), "user", f"{place}, column {prompt!r}")
        answered = _turns(row.get(completion), "assistant", f"{place}, column {completion!r}")
        before = [
            {**turn, "train": False} if turn.get("role") == "assistant" else turn for turn in asked
        ]
        own = (prompt, completion, "messages")
        rest = {key: held for key, held in row.items() if key not in own}
        out.append({**rest, "messages": [*before, *answered]})
    return out


def _is_list(value: Any) -> bool:
    return isinstance(value, list) or (isinstance(value, str) and value.lstrip().startswith("[{"))


def _turns(value: Any, role: str, where: str) -> list[dict[str, Any]]:
    if isinstance(value, str) and not _is_list(value):
        return [{"role": role, "content": value}]
    value = json_value(value, where) if isinstance(value, str) else value
    value = [value] if isinstance(value, Mapping) else value
    if not isinstance(value, list) or not all(isinstance(turn, Mapping) for turn in value):
        raise WeftError(f"{where}: {value!r:.60} is neither text nor a list of messages.")
    return [dict(turn) for turn in value]


def with_labels(
    rows: list[Row], places: Sequence[str], kind: str | None, allowed: Sequence[str]
) -> list[Row]:
    """Returns records of the format "label" with labels as the rules have them. `kind` and
    `allowed` (model.labels) are those of the model section. Raises WeftError, naming the place
    ("a.csv, line 2, column 'label'").
    """
    values, at = [row.get("label") for row in rows], places
    if kind == "regression":
        made: Sequence[Any] = class_labels.scores(values, at)
    else:
        made = class_labels.classes(values, at, allowed)
        if kind is None and not allowed and class_labels.has_fractions(made):
            raise WeftError(
                f"{at[0]}: the labels are numbers that are not all whole, such as {made[0]!r}. "
                "Write model.kind: regression, or classification if each number is a class."
            )
    return [{**row, "label": label} for row, label in zip(rows, made, strict=True)]
