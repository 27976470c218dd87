"""Whether everything in a conversation appears in its rendered text, and where.

Every text of a record (a leaf) gets a mark, one private character in its middle, and the
conversation is rendered once more. If the text without the marks is the same as before, the marks
tell exactly where each leaf stands, and a leaf without one was not rendered. A template that acts
on the content itself may be misled by marks; then each leaf is marked alone, and in the end looked
for by its words (literal.py). Numbers are changed instead of marked: the text must change with
them.

What a template may leave out: keys that only link a tool's answer to its call, if the order says
the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import WeftError
from .conversation import REASONING, Conversation
from .literal import around, escaped, halves, own_words

Path = tuple[str | int, ...]
Span = tuple[int, int]
PLANES = (0xF0000, 0x100000, 0xE000)  # private characters, as many as leaves
MOST = 6000
TOOL_TEXTS = ("name", "description")  # of a tool's schema; its other words are the schema's own


@dataclass(frozen=True)
class Leaf:
    """A text, a number or a truth value of a record. `path` starts with messages, tools or
    documents.
    """

    path: Path
    value: Any

    @property
    def message(self) -> int | None:
        """The index of its message."""
        return int(self.path[1]) if self.path[0] == "messages" else None

    @property
    def core(self) -> str:
        """The text without blanks around it, which templates may strip."""
        return str(self.value).strip()


@dataclass(frozen=True)
class Found:
    """A rendered conversation: its text, where each of its leaves with text stands in it, and the
    leaves that do not appear in it.
    """

    talk: Conversation
    text: str
    spans: dict[Path, list[Span]]
    unread: list[Leaf]

    def of_message(self, index: int, start: int = 0) -> list[Span]:
        """Returns the first span from `start` on of every leaf of a message, in order."""
        firsts = [
            next((span for span in spans if span[0] >= start), None)
            for path, spans in self.spans.items()
            if path[:2] == ("messages", index)
        ]
        return sorted(span for span in firsts if span is not None)

    def begin(self, start: int) -> int:
        """Returns where a message's content begins of which the span starts at `start`, with the
        blanks before it that are its own.
        """
        for path, spans in self.spans.items():
            if path[0] == "messages" and path[2:] == ("content",):
                content = self.talk.messages[int(path[1])]["content"]
                own = content[: len(content) - len(content.lstrip())]
                if any(low == start for low, _ in spans) and self.text.endswith(own, 0, start):
                    return start - len(own)
        return start


def find(talk: Conversation, render: Callable[[Conversation], str]) -> Found:
    """Renders a conversation and finds its leaves in the text."""
    text = render(talk)
    leaves = list(leaves_of(talk))
    texts = [leaf for leaf in leaves if isinstance(leaf.value, str)]
    places: Sequence[list[int] | None] | None = _marked(talk, text, texts, render)
    if places is None:
        alone = (_marked(talk, text, [leaf], render) for leaf in texts)
        places = [None if found is None else found[0] for found in alone]
    spans: dict[Path, list[Span]] = {}
    unread: list[Leaf] = []
    for leaf, places_of in zip(texts, places, strict=True):
        if places_of is not None:
            spans[leaf.path] = around(text, places_of, _forms(leaf, talk))
    taken = [span for several in spans.values() for span in several]
    for leaf, places_of in zip(texts, places, strict=True):
        if places_of is None:
            spans[leaf.path] = own_words(text, _forms(leaf, talk), taken)
        if not spans[leaf.path]:
            del spans[leaf.path]
            unread.append(leaf)
    unread += [
        leaf
        for leaf in leaves
        if not isinstance(leaf.value, str) and not _matters(talk, text, leaf, render)
    ]
    unread += [leaf for leaf in _mappings(talk) if _as_python(leaf, text)]
    return Found(talk, text, spans, unread)


def leaves_of(talk: Conversation) -> Iterator[Leaf]:
    """Yields what must appear in the text."""
    implied = set(_implied(talk))
    for index, message in enumerate(talk.messages):
        for key, value in message.items():
            if key != "role":
                for leaf in _below(("messages", index, key), value):
                    if leaf.path not in implied:
                        yield leaf
    for name in ("tools", "documents"):
        for index, entry in enumerate(getattr(talk, name) or ()):
            for leaf in _below((name, index), entry):
                if name == "documents" or leaf.path[-1] in TOOL_TEXTS:
                    yield leaf


def _below(path: Path, value: Any) -> Iterator[Leaf]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _below((*path, key), inner)
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _below((*path, index), inner)
    elif value is None or (isinstance(value, str) and not value.strip()):
        return
    elif path[2:3] != ("content",) or path[-1] != "type":  # the type of a part with text
        yield Leaf(path, value)


def _implied(talk: Conversation) -> Iterator[Path]:
    """Paths of keys that say no more than the order of calls and answers does."""
    for index, message in enumerate(talk.messages):
        legacy = message.get("function_call")
        calls = [legacy] if legacy else message.get("tool_calls") or []
        answers = _answers(talk, index)
        in_order = True
        for call, later in zip(calls, answers, strict=False):
            answer = talk.messages[later]
            if answer.get("tool_call_id") == call.get("id"):
                yield ("messages", later, "tool_call_id")
            elif "tool_call_id" in answer and "id" in call:
                in_order = False
            if answer.get("name") == call.get("function", call).get("name"):
                yield ("messages", later, "name")
        for number, call in enumerate(() if legacy else calls):
            known = {
                "type": "function",
                "index": number,
                "id": call.get("id") if in_order else None,
            }
            for key, value in known.items():
                if call.get(key) == value:
                    yield ("messages", index, "tool_calls", number, key)


def _answers(talk: Conversation, index: int) -> list[int]:
    """The tools' messages right after this one."""
    after = range(index + 1, len(talk.messages))
    stop = next((i for i in after if talk.messages[i]["role"] not in ("tool", "function")), None)
    return list(after if stop is None else range(index + 1, stop))


def _marked(
    talk: Conversation, text: str, leaves: Sequence[Leaf], render: Callable[[Conversation], str]
) -> list[list[int]] | None:
    """The places in `text` of the middle of each leaf, or None if marks change the text."""
    plane = next((p for p in PLANES if not _private(p).search(text)), None)
    if plane is None or len(leaves) > MOST:
        return None
    marked = talk
    for number, leaf in enumerate(leaves):
        at = leaf.value.index(leaf.core) + len(halves(leaf.core)[0])
        marked = _with(marked, leaf.path, leaf.value[:at] + chr(plane + number) + leaf.value[at:])
    try:
        shown = render(marked)
    except WeftError:
        return None
    places: list[list[int]] = [[] for _ in leaves]
    marks = list(_private(plane).finditer(shown))
    if _private(plane).sub("", shown) != text:
        return None
    for before, match in enumerate(marks):
        number = ord(match[0]) - plane
        if number >= len(leaves):
            return None
        places[number].append(match.start() - before)
    return places


def _private(plane: int) -> re.Pattern[str]:
    return re.compile(f"[{chr(plane)}-{chr(plane + MOST)}]")


def _forms(leaf: Leaf, talk: Conversation) -> list[tuple[str, str]]:
    """The halves of a leaf's text as templates may print them: as it is, as a part of JSON, and in
    tools and documents as a part of HTML. What an assistant says is learned as it is.
    """
    if leaf.path[-1] == "arguments":  # JSON already: escaped once more it is another text
        return escaped(leaf.core, "")
    if leaf.message is None:
        return escaped(leaf.core, "json html")
    said = leaf.path[2] in ("content", *REASONING)
    learned = said and talk.messages[leaf.message]["role"] == "assistant"
    return escaped(leaf.core, "" if learned else "json")


def _matters(
    talk: Conversation, text: str, leaf: Leaf, render: Callable[[Conversation], str]
) -> bool:
    """Whether the text changes with a number or a truth value."""
    other = not leaf.value if isinstance(leaf.value, bool) else int(leaf.value == 0)
    try:
        return render(_with(talk, leaf.path, other)) != text
    except WeftError:
        return True


def _mappings(talk: Conversation) -> Iterator[Leaf]:
    """Mappings of which templates print the texts: parts of content, arguments of calls."""
    for index, message in enumerate(talk.messages):
        parts = message.get("content")
        for number, part in enumerate(parts if isinstance(parts, list) else ()):
            yield Leaf(("messages", index, "content", number), part)
        for number, call in enumerate(message.get("tool_calls") or ()):
            inner = ("function",) if "function" in call else ()
            held = call.get("function", call).get("arguments")
            if isinstance(held, dict) and held:
                path = ("messages", index, "tool_calls", number, *inner, "arguments")
                yield Leaf(path, held)


def _as_python(leaf: Leaf, text: str) -> bool:
    """Whether a mapping was printed as Python's, {'a': True}, and not as JSON."""
    python = repr(leaf.value)
    return python != json.dumps(leaf.value, ensure_ascii=False) and python in text


def _with(talk: Conversation, path: Path, value: Any) -> Conversation:
    """The conversation with another value at `path`."""
    return replace(talk, **{str(path[0]): _changed(getattr(talk, str(path[0])), path[1:], value)})


def _changed(inside: Any, path: Path, value: Any) -> Any:
    if not path:
        return value
    copied: Any = dict(inside) if isinstance(inside, dict) else list(inside)
    copied[path[0]] = _changed(inside[path[0]], path[1:], value)
    return copied
