"""Every column of a record is used, or refused by name.

A column that no format reads may be what matters most (tools, a system prompt, the worse answer of
a pair), so it is an error. Columns and message keys without meaning for training (ids, metadata)
are listed in `data.ignore`, and left out before anything else (ignored.py).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ..encoding.conversation import json_value
from ..errors import WeftError
from ..tasks.files import Row
from .formats import CHAT, IMAGES, TEMPLATE_INPUTS

PAIR = ("chosen", "rejected")
EMPTY: tuple[Any, ...] = (None, "", [], {})


def check_pairs(rows: Sequence[Row], ignored: Collection[str], name: str) -> None:
    """Raises WeftError for preference pairs, of which training on completions would use one half.
    Pairs beside other columns may be ignored, as a whole.
    """
    for number, row in enumerate(rows, 1):
        found = [column for column in PAIR if row.get(column) not in EMPTY]
        if not set(found) <= set(ignored):
            raise WeftError(
                f"{name}, sample {number}: {' and '.join(found)} is a preference pair, and weft "
                "train has no loss for pairs; it would learn from one half. Train on pairs with "
                "TRL's DPOTrainer and a Weft adapter (weft.attach, then trl.DPOTrainer). To learn "
                "the preferred answers only, write a file with the columns prompt and completion."
            )


def check_read(
    rows: Sequence[Row], read: Collection[str], name: str, columns: Mapping[str, str]
) -> None:
    """Raises WeftError, naming the first record with it, for columns that nothing reads. `columns`
    is data.columns, by which the records are renamed.
    """
    first: dict[str, int] = {}
    for number, row in enumerate(rows, 1):
        for column, value in row.items():
            if column not in read and not any(value is e or value == e for e in EMPTY):
                first.setdefault(str(columns.get(column, column)), number)
    if first:
        raise WeftError(
            f"{name}, sample {min(first.values())}: nothing reads the column"
            f"{'s' * (len(first) > 1)} {', '.join(map(repr, first))}. A column that is meant has "
            "one of the names in docs/train.md (data.columns renames it); if it has no meaning "
            f"for training, write data.ignore: [{', '.join(first)}]."
        )


def is_chat(rows: Sequence[Row], chosen: str) -> bool:
    """Whether samples of this format are conversations: prompts are if they come with a system
    prompt, a history, tools, documents or images.
    """
    return chosen in ("messages", "instruction") or (
        chosen == "prompt"
        and any(row.get(key) not in EMPTY for row in rows for key in (*CHAT, *IMAGES))
    )


def chat_row(row: Row, chosen: str, where: str) -> Row:
    """Returns a record of a chat format with messages, tools and documents. Raises WeftError."""
    made = {key: row[key] for key in TEMPLATE_INPUTS if row.get(key) not in EMPTY}
    messages = json_value(row.get("messages"), f"{where}: messages")
    if chosen != "messages":
        messages = [*_history(row, where), *_question_and_answer(row, chosen)]
    system = row.get("system")
    if system not in EMPTY:
        if not isinstance(system, str):
            raise WeftError(f"{where}: system={system!r:.60} is not text.")
        if isinstance(messages, list):
            if any(isinstance(m, Mapping) and m.get("role") == "system" for m in messages):
                raise WeftError(
                    f"{where}: there is a column system and a message with the role system. Leave "
                    "one of them out (data.ignore: [system] leaves the column out)."
                )
            messages = [{"role": "system", "content": system}, *messages]
    return {"messages": messages, **made}


def _question_and_answer(row: Row, chosen: str) -> list[dict[str, Any]]:
    if chosen == "prompt":
        asked, answer = row["prompt"], row["completion"]
    else:
        more = row.get("input") or ""
        asked = row["instruction"] + (f"\n\n{more}" if more.strip() else "")
        answer = row["output"]
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


def _history(row: Row, where: str) -> list[dict[str, Any]]:
    """Earlier turns: pairs of question and answer, or messages."""
    given = json_value(row.get("history"), f"{where}: history")
    if given in EMPTY:
        return []
    found: list[dict[str, Any]] = []
    for number, entry in enumerate(given if isinstance(given, list) else [given], 1):
        if isinstance(entry, Mapping):
            found.append(dict(entry))
        elif (
            isinstance(entry, list | tuple)
            and len(entry) == 2
            and all(isinstance(text, str) for text in entry)
        ):
            found += [
                {"role": role, "content": text}
                for role, text in zip(("user", "assistant"), entry, strict=True)
            ]
        else:
            raise WeftError(
                f"{where}: history, entry {number}: write [question, answer] or {{role, content}}; "
                f"this is {entry!r:.60}."
            )
    return found
