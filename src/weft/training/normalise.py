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
from collections.abc import Callable, Collection, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from ..encoding.conversation import json_value
from ..errors import WeftError
from ..tasks import class_labels
from ..tasks.files import Row
from .formats import TEXTS
from .records import EMPTY

SHAREGPT = ("conversations", "conversation")
PROMPTS = ("prompt", "completion")  # TRL's, which may be lists of messages
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


def message_columns(rows: Sequence[Row], columns: Mapping[str, str]) -> dict[str, str]:
    """Returns the columns that hold "messages" or "documents", and which. `columns` is
    data.columns, by which the records are renamed already.
    """
    names = ["messages", "history"]
    if "messages" not in columns:
        names += SHAREGPT
    if _is_conversational(rows):
        names += PROMPTS
    return {**dict.fromkeys(names, "messages"), "documents": "documents"}


def opened(
    rows: Sequence[Row], places: Sequence[str], holders: Collection[str], columns: Mapping[str, str]
) -> list[Row]:
    """Returns the records with lists in `holders` where a table's cell has them as JSON text."""
    out = []
    for row, place in zip(rows, places, strict=True):
        changed = {}
        for name in holders:
            value, where = row.get(name), f"{place}, column {columns.get(name, name)!r}"
            if isinstance(value, str) and (name not in PROMPTS or _is_list(value)):
                changed[name] = json_value(value, where)
            value = changed.get(name, value)
            if name == "documents" and isinstance(value, list):
                changed[name] = [json_value(entry, where) for entry in value]
        out.append({**row, **changed} if changed else row)
    return out


def normalised(
    rows: Sequence[Row], places: Sequence[str], columns: Mapping[str, str], chats: bool = True
) -> list[Row]:
    """Returns `opened` records in Weft's conventions. `chats` is False if data.format says that
    they are no conversations.

    Raises WeftError, which names file, line and the file's column.
    """

    def each(change: Callable[[Row, str, Mapping[str, str]], Row], given: list[Row]) -> list[Row]:
        return [change(row, place, columns) for row, place in zip(given, places, strict=True)]

    found = each(_texts, list(rows))
    if not chats:
        return found
    found = each(_conversation, found)
    return each(_joined, found) if _is_conversational(found) else found


def _texts(row: Row, place: str, columns: Mapping[str, str]) -> Row:
    changed = {}
    for name in TEXTS:
        value = row.get(name)
        if isinstance(value, bool | int | float):
            if isinstance(value, float) and not math.isfinite(value):
                raise WeftError(
                    f"{place}, column {columns.get(name, name)!r}: {value} is a missing value, and "
                    "text is expected. Remove the record."
                )
            changed[name] = json.dumps(value)
    return {**row, **changed} if changed else row


def _conversation(row: Row, place: str, columns: Mapping[str, str]) -> Row:
    """A record with ShareGPT's list as messages. Which column holds it may differ by record."""
    names = ("messages",) if "messages" in columns else ("messages", *SHAREGPT)
    column = next((name for name in names if row.get(name) not in EMPTY), None)
    if column is None:
        return row
    value, where = row[column], f"{place}, column {columns.get(column, column)!r}"
    if isinstance(value, list) and any(_is_sharegpt(message) for message in value):
        value = [_message(message, where, n) for n, message in enumerate(value, 1)]
    rest = {key: held for key, held in row.items() if key not in (column, "messages")}
    return {**rest, "messages": value}


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


def _is_conversational(rows: Sequence[Row]) -> bool:
    return all(row.get("messages") in EMPTY for row in rows) and any(
        _is_list(row.get("prompt")) for row in rows
    )


def _joined(row: Row, place: str, columns: Mapping[str, str]) -> Row:
    """A record whose prompt and completion are messages, as one conversation. Only the completion's
    answers are in the loss, as in TRL.
    """
    asked, answered = (
        _turns(row.get(name), role, f"{place}, column {columns.get(name, name)!r}")
        for name, role in zip(PROMPTS, ("user", "assistant"), strict=True)
    )
    before = [
        {**turn, "train": False} if turn.get("role") == "assistant" else turn for turn in asked
    ]
    rest = {key: held for key, held in row.items() if key not in (*PROMPTS, "messages")}
    return {**rest, "messages": [*before, *answered]}


def _is_list(value: Any) -> bool:
    return isinstance(value, list) or (isinstance(value, str) and value.lstrip().startswith("[{"))


def _turns(value: Any, role: str, where: str) -> list[dict[str, Any]]:
    if isinstance(value, str) and not _is_list(value):
        return [{"role": role, "content": value}]
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
