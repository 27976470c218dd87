"""What of a record a chat template leaves out or changes, as an error with the cure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from ..errors import WeftError
from .conversation import CALLS, REASONING, Conversation
from .leaves import Found, Leaf

SHOWN, SHOWN_CHARS = 3, 40  # leaves whose text an error has, and letters of each
PLACES = 20  # messages or samples that an error lists


class UnreadError(WeftError):
    """A record has text that the chat template does not render as it is written."""


def refuse_unread(found: Found, where: str) -> None:
    """Raises UnreadError, naming record, messages and keys, if a leaf is not in the text."""
    if not found.unread:
        return
    parts = [_described(leaf, found.talk) for leaf in found.unread[:SHOWN]]
    rest = found.unread[SHOWN:]
    parts += list(_listed(rest[:PLACES])) + ([f"{len(rest) - PLACES} more"] * (len(rest) > PLACES))
    raise UnreadError(
        f"{where}: the chat template does not render as written, or not at all: "
        f"{'; '.join(parts)}. The model would not see it. {_cure(found.unread[0], found.talk)}"
    )


def with_others(first: UnreadError, others: Sequence[str], all_seen: bool) -> UnreadError:
    """Returns the error of the first record, with the names of the other records that have one."""
    if not others:
        return first
    few = "" if all_seen else "at least "
    return UnreadError(f"{first} So it is in {few}{len(others)} more: {', '.join(others)}.")


def _listed(leaves: Sequence[Leaf]) -> Iterator[str]:
    """'content' of messages 4, 6: leaves beyond those that are shown."""
    ordered = sorted(leaves, key=lambda leaf: (leaf.message is None, _name(leaf)))
    for (alone, name), group in groupby(ordered, lambda leaf: (leaf.message is None, _name(leaf))):
        numbers = [str(leaf.message + 1) for leaf in group if leaf.message is not None]
        yield f"{name!r}" if alone else f"{name!r} of message {', '.join(numbers)}"


def _name(leaf: Leaf) -> str:
    keys = list(leaf.path if leaf.message is None else leaf.path[2:])
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys).lstrip(".")


def _described(leaf: Leaf, talk: Conversation) -> str:
    of = (
        ""
        if leaf.message is None
        else f" of message {leaf.message + 1} ({talk.messages[leaf.message]['role']})"
    )
    shown = str(leaf.value)
    shown = shown if len(shown) <= SHOWN_CHARS else shown[:SHOWN_CHARS] + "..."
    return f"{_name(leaf)!r}{of}: {shown!r}"


def _cure(leaf: Leaf, talk: Conversation) -> str:
    """What to do about a leaf that is not rendered."""
    other = "Give a template that does with data.chat_template"
    if leaf.message is None:
        name = f"documents.{leaf.path[2]}" if leaf.path[0] == "documents" else leaf.path[0]
        return f"{other}, or leave it out with data.ignore: [{name}]."
    key = str(leaf.path[2])
    role, later = talk.messages[leaf.message]["role"], len(talk.messages) - leaf.message - 1
    if key in ("content", *REASONING) and role == "assistant" and later:
        other += (
            ", or, if it drops this from all but the last answer, make the conversation up to this "
            "message a record of its own"
        )
    if key == "content":
        return f"{other}, or, if it leaves the message out, write it with a role that it knows."
    if key in CALLS and len(leaf.path) > 3:
        return f"{other}, or remove it from the record. data.ignore leaves tool calls whole."
    return f"{other}, or leave the key out with data.ignore: [messages.{key}]."
