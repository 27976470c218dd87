"""The pictures of a record, in the ways in which people write them, as one.

    messages: [{role: user, content: [{type: image, path: cat.png}, {type: text, text: ...}]}]
    messages: [... {type: image} ...], images: [cat.png]          TRL; without a place they come first
    conversations: [{from: human, value: "<image>..."}], image: cat.png     LLaVA

Paths are relative to the folder of the data file. After this `images` has absolute paths, and the
messages a part {type: image} for each of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..encoding.conversation import json_value
from ..errors import WeftError
from ..tasks.files import Row
from .formats import IMAGES
from .records import EMPTY

MARK = "<image>"  # LLaVA's, in a text
KEYS = ("path", "image", "url")  # of a part {type: image}


def with_images(made: Row, row: Row, folder: Path | None, where: str) -> Row:
    """Returns a record `made` with messages, with the pictures of the record `row` that it is made
    of. Raises WeftError, naming the record, for pictures without a place and places without one.
    """
    given = _given(row, where)
    messages = made["messages"]
    if not isinstance(messages, list) or not all(isinstance(m, Mapping) for m in messages):
        return made  # the checks after name what is wrong
    parts = [part for message in messages for part in _image_parts(message)]
    if not given and not parts:
        return made
    if not parts:
        messages = _placed(messages, len(given), where)
    waiting, names = iter(given), list[str]()
    messages = [
        _filled(message, waiting, names, f"{where}, message {i}")
        for i, message in enumerate(messages, 1)
    ]
    left = len(list(waiting))
    if left:
        raise WeftError(
            f"{where}: it has {len(given)} images and places for {len(given) - left}. Write a part "
            f"{{type: image}} (or {MARK} in the text) for each of them."
        )
    base = folder or Path()
    return {
        **made,
        "messages": messages,
        "images": [str((base / Path(name).expanduser()).absolute()) for name in names],
    }


def _given(row: Row, where: str) -> list[str]:
    """The pictures beside the messages."""
    columns = [name for name in IMAGES if row.get(name) not in EMPTY]
    if len(columns) > 1:
        raise WeftError(
            f"{where}: the columns image and images are both given; leave one out with data.ignore."
        )
    found: list[str] = []
    for column in columns:
        held = json_value(row[column], f"{where}: {column}")
        entries = held if isinstance(held, list | tuple) else [held]
        found += [_name(entry, f"{where}: {column}") for entry in entries]
    return found


def _name(entry: Any, where: str) -> str:
    """A path. Raises WeftError for anything else."""
    if isinstance(entry, Mapping) and entry.get("bytes") is None:
        entry = entry.get("path")
    if not isinstance(entry, str) or not entry.strip():
        raise WeftError(
            f"{where} has {type(entry).__name__} {entry!r:.40}, and an image is the path of a file. "
            "Images within a table would all be held in memory: write them to files, and their paths "
            "into the table."
        )
    if "://" in entry or entry.startswith("data:"):
        raise WeftError(
            f"{where}: {entry!r:.60} is an address, and nothing is downloaded. Save the image, and "
            "write the path of the file."
        )
    return entry


def _image_parts(message: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    content = message.get("content")
    for part in content if isinstance(content, list) else ():
        if isinstance(part, Mapping) and part.get("type") == "image":
            yield part


def _filled(
    message: Mapping[str, Any], waiting: Iterator[str], names: list[str], where: str
) -> Mapping[str, Any]:
    """The message with bare parts {type: image}; their paths are added to `names`."""
    if not any(True for _ in _image_parts(message)):
        return message
    content = []
    for part in message["content"]:
        if isinstance(part, Mapping):
            part = {key: value for key, value in part.items() if value is not None}
        if isinstance(part, Mapping) and part.get("type") == "image":
            names.append(_path_of(part, waiting, where))
            part = {"type": "image"}
        content.append(part)
    return {**message, "content": content}


def _path_of(part: Mapping[str, Any], waiting: Iterator[str], where: str) -> str:
    own = [key for key in KEYS if key in part]
    other = next((key for key in part if key not in ("type", *KEYS)), None)
    if other is not None or len(own) > 1:
        raise WeftError(
            f"{where}: an image is {{type: image, path: ...}}, and nothing reads its key "
            f"{other or own[1]!r}. Leave it out with data.ignore: [messages.{other or own[1]}]."
        )
    if own:
        return _name(part[own[0]], f"{where}: the image's {own[0]}")
    name = next(waiting, None)
    if name is None:
        raise WeftError(
            f"{where}: it has a place for an image, and there is none left for it in the column "
            "images. Give as many images as there are places, or a path: {type: image, path: ...}."
        )
    return name


def _placed(messages: Sequence[Mapping[str, Any]], count: int, where: str) -> list[Any]:
    """The messages with a part for each picture: at the marks in the texts, or before the first
    text of a user if there are none.
    """
    marks = sum(
        message["content"].count(MARK)
        for message in messages
        if message.get("role") == "user" and isinstance(message.get("content"), str)
    )
    if marks:
        return [_split(m) if m.get("role") == "user" else m for m in messages]
    first = next((i for i, m in enumerate(messages) if m.get("role") == "user"), None)
    if first is None:
        raise WeftError(f"{where}: it has images, and no message of a user for them.")
    content = messages[first].get("content")
    texts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    placed = {**messages[first], "content": [*[{"type": "image"}] * count, *texts]}
    return [*messages[:first], placed, *messages[first + 1 :]]


def _split(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """The message with its marks as parts. Blanks around a mark are the mark's."""
    content = message.get("content")
    if not isinstance(content, str) or MARK not in content:
        return message
    parts: list[dict[str, Any]] = []
    pieces = content.split(MARK)
    for number, piece in enumerate(pieces):
        text = piece.lstrip() if number else piece
        text = text.rstrip() if number < len(pieces) - 1 else text
        parts += [{"type": "image"}] * (number > 0) + [{"type": "text", "text": text}] * bool(text)
    return {**message, "content": parts}
