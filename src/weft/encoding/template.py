"""A tokenizer's chat template: conversations to text.

A template may print the current date. Within one `ChatTemplate` the clock stands still, so that
the same messages are the same text however often they are rendered.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

from ..errors import WeftError
from .conversation import Conversation, Message, image_parts, json_value

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_DATE = re.compile(r"strftime_now\s*\(\s*(\"[^\"]*\"|'[^']*')\s*\)")
PROBE = "\U0010fffd"  # stands for an answer whose place in the text is wanted


class ChatTemplate:
    """The chat template of a tokenizer, or `source` in its place. `placeholder` is what it prints
    for a picture.

    Raises WeftError, when it is used, if there is none, or if it refuses a conversation.
    """

    def __init__(
        self,
        tokenizer: Any,
        source: str | None = None,
        now: datetime | None = None,
        placeholder: str | None = None,
    ) -> None:
        self.tokenizer, self.given, self.placeholder = tokenizer, source, placeholder
        self._asks = False
        self.now = now or datetime.now().astimezone()  # local, as the template would print it

    def source(self, tools: Any = None) -> str:
        """Returns the template for a conversation with these tools; a tokenizer may have several."""
        if not self.given and not getattr(self.tokenizer, "chat_template", None):
            raise WeftError(
                "messages need a chat template, and the tokenizer has none. Give one in a file: "
                "data.chat_template, or --chat-template of weft judge."
            )
        try:
            return str(self.tokenizer.get_chat_template(self.given or None, tools))
        except ValueError as error:
            raise WeftError(f"the tokenizer's chat template cannot be chosen: {error}") from None

    def marks_turns(self, tools: Any = None) -> bool:
        """Whether a {% generation %} block says what is in the loss."""
        return _GENERATION.search(self.source(tools)) is not None

    def prints_date(self) -> bool:
        """Whether the text depends on the clock."""
        return "strftime_now" in self.source()

    def render(
        self, talk: Conversation, count: int | None = None, prompt: bool = False, **options: Any
    ) -> Any:
        """Returns the first `count` messages (None: all) as text; with `prompt` up to where the
        assistant's next answer begins. options: of `apply_chat_template`.

        Each picture's placeholder is replaced by its tokens. Raises WeftError if there are more or
        fewer placeholders than pictures.
        """
        if not talk.messages[:count]:
            return ""
        made = self._printed(talk, count, prompt, **options)
        if self.placeholder is None or not isinstance(made, str):
            return made
        return self._with_images(made, talk, count)

    def places(self, talk: Conversation, offsets: Sequence[Sequence[int]]) -> list[Sequence[int]]:
        """Returns places in the text that the template prints as places in that of `render`."""
        if self.placeholder is None:
            return list(offsets)
        starts = [m.start() for m in re.finditer(re.escape(self.placeholder), self._printed(talk))]

        def moved(at: int) -> int:
            before = sum(start < at for start in starts)
            return at + sum(len(t) - len(self.placeholder or "") for t in talk.images[:before])

        return [tuple(map(moved, place)) for place in offsets]

    def _with_images(self, text: str, talk: Conversation, count: int | None) -> str:
        pieces = text.split(self.placeholder)
        wanted = sum(image_parts(message) for message in talk.messages[:count])
        if len(pieces) - 1 != wanted:
            raise WeftError(
                f"the chat template prints {len(pieces) - 1} placeholders {self.placeholder!r} for "
                f"{wanted} images"
            )
        return "".join(
            piece + image for piece, image in zip(pieces, (*talk.images[:wanted], ""), strict=True)
        )

    def _printed(
        self, talk: Conversation, count: int | None = None, prompt: bool = False, **options: Any
    ) -> Any:
        messages = talk.messages[:count]
        source = self.source(talk.tools)
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                tools=talk.tools,
                documents=talk.documents,
                chat_template=self._at_one_time(source),
                add_generation_prompt=prompt,
                **{"tokenize": False, **options},
            )
        except Exception as error:  # jinja's own errors, and raise_exception of the template
            raise WeftError(
                f"the chat template refuses a conversation with the roles "
                f"{[m['role'] for m in messages]}: {error}"
            ) from error

    def prompt(self, talk: Conversation) -> str:
        """Returns the text before the answer to a conversation. If the template has no generation
        prompt, the header that it prints before an answer is added, as in training.
        """
        text: str = self.render(talk, prompt=True)
        if text != self.render(talk):
            return text
        answer: Any = PROBE if _has_text(talk) else [{"type": "text", "text": PROBE}]
        answered = talk.with_messages([*talk.messages, {"role": "assistant", "content": answer}])
        try:
            before, found, _ = self.render(answered).partition(PROBE)
        except WeftError:
            return text
        header = before[len(text) :] if found and before.startswith(text) else ""
        return text + header if header.strip() else text

    def asks(self, talk: Conversation, count: int) -> bool:
        """Whether the template has a generation prompt. One that has it once always has."""
        self._asks = self._asks or self.generation_prompt(talk, count) != ""
        return self._asks

    def generation_prompt(self, talk: Conversation, count: int) -> str:
        """Returns what is added to the first `count` messages for the assistant to answer; "" if
        the template ignores add_generation_prompt.
        """
        before, plain = self.render(talk, count, prompt=True), self.render(talk, count)
        return str(before[common_length(before, plain) :])

    def _at_one_time(self, source: str) -> str:
        """The template with the dates that it asks for as constants."""
        if "strftime_now" not in source:
            return source
        return _DATE.sub(lambda match: repr(self.now.strftime(match[1][1:-1])), source)


def common_length(first: str, second: str) -> int:
    """Returns how many characters two texts have in common at their beginnings."""
    shorter = min(len(first), len(second))
    return next((i for i in range(shorter) if first[i] != second[i]), shorter)


def _has_text(talk: Conversation) -> bool:
    return all(isinstance(message.get("content", ""), str) for message in talk.messages)


def forms(talk: Conversation) -> Iterator[Conversation]:
    """Yields a conversation in the forms that templates want, its own first: the arguments of calls
    as objects or as JSON text, calls of functions or of tools, no content or an empty one, content
    as text or in parts.
    """
    filled = [{"content": "", **message} for message in talk.messages]
    bases = [talk.messages]
    for messages in (list(map(_of_tools, talk.messages)), filled, list(map(_of_tools, filled))):
        if messages not in bases:
            bases.append(messages)
    for base in map(talk.with_messages, bases):
        yield base
        for as_text in (False, True):
            turned = with_call_arguments(base, as_text)
            if turned is not None:
                yield turned
    yield talk.with_messages(
        [
            message
            if isinstance(message["content"], list)
            else {**message, "content": [{"type": "text", "text": message["content"]}]}
            for message in filled
        ]
    )


def _of_tools(message: Message) -> Message:
    """A message with a function's call or answer, as it was written before there were tools, as one
    of a tool.
    """
    made = {key: value for key, value in message.items() if key != "function_call"}
    if message.get("function_call"):
        made["tool_calls"] = [{"type": "function", "function": message["function_call"]}]
    return {**made, "role": "tool"} if message["role"] == "function" else made


def with_call_arguments(talk: Conversation, as_text: bool) -> Conversation | None:
    """Returns the conversation with the arguments of all tool calls as JSON text, or as the objects
    that such texts hold; None if that changes nothing.
    """
    changed = False

    def turned(function: Any) -> Any:
        nonlocal changed
        arguments = function.get("arguments") if isinstance(function, dict) else None
        if as_text and isinstance(arguments, dict):
            changed = True
            return {**function, "arguments": json.dumps(arguments, ensure_ascii=False)}
        if not as_text and isinstance(arguments, str):
            try:
                held = json_value(arguments, "arguments")
            except WeftError:  # no object that a template could take, so the text itself is
                return function
            if isinstance(held, dict):
                changed = True
                return {**function, "arguments": held}
        return function

    messages: list[Message] = []
    for message in talk.messages:
        message = dict(message)
        if message.get("tool_calls"):
            message["tool_calls"] = [
                {**call, "function": turned(call["function"])}
                if "function" in call
                else turned(call)
                for call in message["tool_calls"]
            ]
        if message.get("function_call"):
            message["function_call"] = turned(message["function_call"])
        messages.append(message)
    return talk.with_messages(messages) if changed else None
