"""One record of chat data, in the form that chat templates read.

Nothing is rendered here. The forms in which people write conversations are brought to one: content
in parts becomes its text, a JSON text becomes what it holds, and `weight` and `train` of a message
say whether it is in the loss. All else is passed to the template, and `leaves.py` checks that it
appears in the sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

from ..errors import WeftError
from ..untrusted import json_text

ROLES = ("system", "user", "assistant", "tool", "developer", "function")
TEXT_PARTS = ("text", "input_text", "output_text")
CALLS = ("tool_calls", "function_call")
REASONING = ("reasoning_content", "thinking", "reasoning")
IN_LOSS = ("weight", "train")  # keys of a message that Weft reads itself
Message = dict[str, Any]


@dataclass(frozen=True)
class Conversation:
    """Messages as the template gets them, which of them are in the loss, the template's other
    inputs, and which messages the record itself takes out of the loss. `images` has the text that
    stands for each picture, in the order of the parts {type: image}.
    """

    messages: list[Message]
    trained: list[bool]
    tools: list[Message] | None = None
    documents: list[Message] | None = None
    left_out: tuple[int, ...] = ()
    images: tuple[str, ...] = ()

    @property
    def roles(self) -> list[str]:
        """The roles in order."""
        return [message["role"] for message in self.messages]

    def blank(self) -> bool:
        """Whether a trained turn of the assistant says nothing."""
        return any(
            inside
            and not any(_says_something(message.get(key)) for key in message if key != "role")
            for message, inside in zip(self.messages, self.trained, strict=True)
        )

    def with_messages(self, messages: list[Message]) -> Conversation:
        """Returns the same conversation with these messages, of the same number."""
        return replace(self, messages=messages)


def conversation(row: Mapping[str, Any], where: str = "a conversation") -> Conversation:
    """Returns the conversation of a record with `messages`, and `tools` and `documents` if it has
    them.

    Raises WeftError, naming `where`, the message and its key, for what cannot be meant.
    """
    given = json_value(row.get("messages"), f"{where}: messages")
    if not isinstance(given, list) or not given:
        raise WeftError(f"{where}: messages must be a list of {{role, content}}.")
    messages, trained = [], []
    for number, message in enumerate(given, 1):
        place = f"{where}, message {number}"
        _check_message(message, place)
        inside = _in_loss(message, place)
        trained.append(inside)
        messages.append(_plain(message, place))
    _check_images(messages, row.get("images") or (), where)
    if not any(message["role"] == "assistant" for message in messages):
        raise WeftError(
            f"{where}: no message has the role assistant, so there is nothing to learn."
        )
    return Conversation(
        messages,
        trained,
        _mappings(row.get("tools"), f"{where}: tools"),
        _mappings(row.get("documents"), f"{where}: documents"),
        tuple(i for i, message in enumerate(given) if _excluded(message)),
    )


def asked(messages: list[Message]) -> Conversation:
    """Returns a conversation that waits for an answer, for generation."""
    return Conversation([dict(message) for message in messages], [False] * len(messages))


def _check_message(message: Any, place: str) -> None:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise WeftError(
            f"{place}: each message is a mapping with role and content, and this is "
            f"{message!r:.80}."
        )
    role = message["role"]
    if role not in ROLES:
        near = get_close_matches(role, ROLES, n=1) or ROLES
        raise WeftError(f"{place}: role {role!r} is not known. Nearest: {', '.join(near)}.")
    calls = [key for key in CALLS if message.get(key)]
    if message.get("content") is None and not (
        role == "assistant" and (calls or any(message.get(key) for key in REASONING))
    ):
        raise WeftError(
            f"{place}: each message is a mapping with role and content, and this {role} message "
            "has no content."
        )
    if calls and role != "assistant":
        raise WeftError(f"{place}: {calls[0]} is of a message with the role assistant, not {role}.")


def _in_loss(message: Mapping[str, Any], place: str) -> bool:
    """Whether the message is an answer to learn. Raises WeftError for a weight that is no 0 or 1."""
    wanted = {}
    for key in IN_LOSS:
        value = message.get(key)
        if value is None:
            continue
        if value not in ((0, 1) if key == "weight" else (False, True)) or isinstance(value, str):
            allowed = "0 or 1" if key == "weight" else "true or false"
            raise WeftError(
                f"{place}: {key}={value!r}: write {allowed}. A turn is in the loss or not; there "
                "are no weights between."
            )
        wanted[key] = bool(value)
    if len(set(wanted.values())) > 1:
        raise WeftError(f"{place}: weight and train contradict each other; give one of them.")
    role, chosen = message["role"], next(iter(wanted.values()), None)
    if role != "assistant" and chosen:
        raise WeftError(
            f"{place}: {next(iter(wanted))} puts a {role} message into the loss. Only the "
            "assistant's turns are; data.loss_on=all trains on everything."
        )
    return role == "assistant" and chosen is not False


def _excluded(message: Mapping[str, Any]) -> bool:
    return any(message.get(key) is not None and not message[key] for key in IN_LOSS)


def _plain(message: Mapping[str, Any], place: str) -> Message:
    """The message without keys that are None or Weft's own, with its content as text."""
    plain = {
        key: value for key, value in message.items() if value is not None and key not in IN_LOSS
    }
    if "content" in plain:
        plain["content"] = _text_of(plain["content"], f"{place}: content")
    for key in REASONING:
        if key in plain and not isinstance(plain[key], str):
            raise WeftError(f"{place}: {key}={plain[key]!r:.60} is not text.")
    if plain.get("tool_calls") is not None:
        plain["tool_calls"] = _calls(plain["tool_calls"], place)
    return plain


def image_parts(message: Mapping[str, Any]) -> int:
    """Returns how many pictures the content of a message has."""
    content = message.get("content")
    parts = content if isinstance(content, list) else ()
    return sum(isinstance(part, Mapping) and part.get("type") == "image" for part in parts)


def texts_of(talk: Conversation) -> Iterator[tuple[int, str]]:
    """Yields the texts of the messages, each with the number of its message, from 1."""
    for number, message in enumerate(talk.messages, 1):
        for key in ("content", *REASONING):
            held = message.get(key)
            for part in held if isinstance(held, list) else [held]:
                text = part.get("text") if isinstance(part, Mapping) else part
                if isinstance(text, str):
                    yield number, text


def _check_images(messages: list[Message], images: Sequence[Any], where: str) -> None:
    for number, message in enumerate(messages, 1):
        if image_parts(message) and message["role"] == "assistant":
            raise WeftError(
                f"{where}, message {number}: the assistant's content has an image, and only text can "
                "be learned. Move it to a message of the user."
            )
    parts = sum(map(image_parts, messages))
    if parts != len(images):
        raise WeftError(f"{where}: its content has {parts} images, and {len(images)} are given.")


def _text_of(content: Any, place: str) -> str | list[Message]:
    """The text of all parts, or the parts if some are images."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise WeftError(f"{place}={content!r:.60} is not text, nor a list of parts with text.")
    if not image_parts({"content": content}):
        return "".join(_part_text(part, f"{place}, part {n}") for n, part in enumerate(content, 1))
    return [
        {"type": "image"}
        if part == {"type": "image"}
        else {"type": "text", "text": _part_text(part, f"{place}, part {number}")}
        for number, part in enumerate(content, 1)
    ]


def _part_text(part: Any, place: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
    text = part.get("text") if isinstance(part, Mapping) else None
    if kind not in TEXT_PARTS or not isinstance(text, str):
        raise WeftError(
            f"{place}: only parts with text are read, {{type: text, text: ...}}, and images, "
            f"{{type: image, path: ...}}, and this is of the type {kind!r}. Leave such records out."
        )
    more = [f"messages.{key}" for key in part if key not in ("type", "text") and part[key]]
    if more:
        raise WeftError(
            f"{place}: nothing reads its key {more[0].partition('.')[2]!r}. If it has no meaning for "
            f"training, write data.ignore: [{', '.join(more)}]."
        )
    return text


def _calls(value: Any, place: str) -> list[Message]:
    value = json_value(value, f"{place}: tool_calls")
    calls: list[Message] = []
    for number, call in enumerate(value if isinstance(value, list) else [value], 1):
        if isinstance(call, Mapping):
            function = call.get("function", call)
            if isinstance(function, Mapping) and isinstance(function.get("name"), str):
                calls.append(dict(call))
                continue
        raise WeftError(
            f"{place}, tool call {number}: a call is {{type: function, function: {{name, "
            f"arguments}}}}, and this is {call!r:.80}."
        )
    return calls


def _mappings(value: Any, place: str) -> list[Message] | None:
    """`tools` or `documents`: a list of mappings, None if there are none."""
    value = json_value(value, place)
    if value is None or value == "" or value == []:
        return None
    if not isinstance(value, list):
        raise WeftError(f"{place}={value!r:.60} is not a list of mappings.")
    found = []
    for number, entry in enumerate(value, 1):
        entry = json_value(entry, f"{place}, entry {number}")
        if not isinstance(entry, Mapping):
            raise WeftError(f"{place}, entry {number}: {entry!r:.60} is not a mapping.")
        found.append({key: inner for key, inner in entry.items() if inner is not None})
    return found


def json_value(value: Any, place: str) -> Any:
    """Returns what a table's cell or another JSON text holds, and anything else as it is. Raises
    WeftError for a text that begins as a list or mapping and is none, or one that says two things.
    """
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json_text.loads(value)
        except ValueError as error:
            raise WeftError(f"{place}: it is text, but no JSON: {error}.") from None
    return value


def _says_something(value: Any) -> bool:
    return bool(value.strip()) if isinstance(value, str) else bool(value)
