"""Where the assistant's turns are in a rendered conversation: in the template's own
{% generation %} blocks, or found for templates that do not mark them.

Without blocks a turn begins where the prompt of generation ends: the conversation before it is
rendered as for an answer, and must be the beginning of the whole text. It ends with the token that
closes it, after the last of the message's own texts:

* the first token there at which generation stops, else
* the last special token that the template prints after an answer whatever follows it, else
* the token that begins the next message, if generation stops at it (GLM-4's `<|user|>`). If nothing
  follows, it is added.

A special token before the text, such as a role's header, never ends a turn.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ..errors import WeftError
from .conversation import Conversation
from .leaves import Found
from .template import PROBE, ChatTemplate, common_length


@dataclass(frozen=True)
class Turn:
    """A turn of the assistant, in characters: it starts at `start`, its texts end at `content_end`,
    and what closes it is within `close` characters after that. `next` is where the texts of the
    next message begin. `inserted` is what the template prints before the texts by itself.
    """

    index: int
    start: int
    content_end: int
    close: int
    next: int
    inserted: str


def find_turns(found: Found, template: ChatTemplate) -> list[Turn]:
    """Returns the turns that are in the loss. Raises WeftError, with the reason, if one of them
    cannot be located.
    """
    chosen = [i for i, inside in enumerate(found.talk.trained) if inside]
    turns = [_turn(found, template, index) for index in chosen]
    return [turn for turn in turns if turn is not None]


def _turn(found: Found, template: ChatTemplate, index: int) -> Turn | None:
    talk, text = found.talk, found.text
    start = len(_before(found, template, index))
    own = found.of_message(index, start)
    if index == 0 or not template.asks(talk, index):
        # what stands before the answer is its header, and is given in generation too
        if not own:
            return None  # a blank turn without a place
        start = max(start, found.begin(own[0][0])) if text[start : own[0][0]].strip() else start
    talk, last = found.talk, ""
    if own:
        content_end = max(stop for _, stop in own)
        last = text[slice(*max(own, key=lambda span: span[1]))]
    else:
        talk, content_end, last = _probed(found, template, index, start)
    later = [
        low
        for message in range(index + 1, len(talk.messages))
        for low, _ in found.of_message(message, content_end)
    ]
    following = min(later, default=len(text))
    if index == len(talk.messages) - 1:
        close = len(text) - content_end
    else:
        close = _close(talk, template, index, last, text, (content_end, following))
    inserted = text[start : own[0][0] if own else content_end]
    return Turn(index, start, content_end, close, following, inserted if inserted.strip() else "")


def _probed(
    found: Found, template: ChatTemplate, index: int, start: int
) -> tuple[Conversation, int, str]:
    """For a blank turn the conversation with a mark as its text, where that stands, and the mark;
    the conversation itself and `start` if the mark changes anything else.
    """
    messages = list(found.talk.messages)
    content = messages[index].get("content", "")
    if isinstance(content, str):
        messages[index] = {**messages[index], "content": content + PROBE}
        talk = found.talk.with_messages(messages)
        before, _, after = template.render(talk).partition(PROBE)
        if before + after == found.text:
            return talk, len(before), PROBE
    return found.talk, start, ""


def _before(found: Found, template: ChatTemplate, index: int) -> str:
    """The prompt of a turn. Raises WeftError unless the whole text begins with it."""
    before: str = template.render(found.talk, index, prompt=True) if index else ""
    text = found.text
    if text.startswith(before):
        return before
    same = common_length(before, text)
    raise WeftError(
        f"the chat template renders the conversation up to message {index + 1} differently from "
        f"the same messages within the whole ({before[same : same + 30]!r} for generation, "
        f"{text[same : same + 30]!r} within the whole), so that turn cannot be located as the model "
        "would see it. Use a template with a {% generation %} block, make the conversation up to "
        "that message a record of its own, or take its turn out of the loss with train: false."
    )


def _close(
    talk: Conversation,
    template: ChatTemplate,
    index: int,
    last: str,
    text: str,
    between: tuple[int, int],
) -> int:
    """How many characters after the texts belong to the turn, whatever message follows. `last` is
    the last of the texts, `between` the part of `text` before the next message's.
    """

    def after(rendered: str) -> str:
        if text.startswith(rendered):
            return rendered[between[0] :]
        return rendered.rpartition(last)[2] if last else ""

    rest = text[slice(*between)]
    alone = after(template.render(talk, index + 1))
    if rest.startswith(alone):
        return len(alone)
    answered = after(template.render(talk, index + 1, prompt=True))
    return common_length(rest, answered.removesuffix(template.generation_prompt(talk, index)))


def end_of(
    turn: Turn,
    ids: list[int],
    offsets: list[tuple[int, int]],
    special: Collection[int],
    stops: Collection[int],
) -> int | None:
    """Returns the index of the token that ends a turn, or None if none does."""
    after = [
        t
        for t, (start, stop) in enumerate(offsets)
        if turn.content_end <= start < turn.next and stop > start and ids[t] in special
    ]
    own = [t for t in after if offsets[t][1] <= turn.content_end + turn.close]
    stopping = [t for t in own if ids[t] in stops]
    if stopping:
        return stopping[0]
    if own:
        return own[-1]
    return next((t for t in after[:1] if ids[t] in stops), None)


def next_header(found: Found, template: ChatTemplate) -> str:
    """Returns what the template would print after the whole conversation if it went on, with the
    user or with a tool that was called, up to the next message's text.
    """
    talk, text = found.talk, found.text
    last = talk.messages[-1]
    parts = isinstance(last.get("content"), list)
    role = "tool" if last.get("tool_calls") else "user"
    more = {"role": role, "content": [{"type": "text", "text": PROBE}] if parts else PROBE}
    try:
        longer: str = template.render(talk.with_messages([*talk.messages, more]))
    except WeftError:
        return ""
    longer = longer.partition(PROBE)[0]
    if longer.startswith(text):
        return longer[len(text) :]
    own = found.of_message(len(talk.messages) - 1)  # the turn is rendered differently in the middle
    return longer.rpartition(text[slice(*own[-1])])[2] if own else ""


@dataclass(frozen=True)
class Block:
    """What a {% generation %} block marks, in characters; where its messages' texts end in it; and
    what the template prints before them.
    """

    start: int
    stop: int
    content_end: int
    inserted: str


def block_of(found: Found, first: Sequence[int], stop: int) -> Block | None:
    """Returns the block from the place of its first token to `stop`; None if its message is taken
    out of the loss. A token over the beginning of the text began before the block.
    """
    own = [
        (span, inside)
        for index, inside in enumerate(found.talk.trained)
        for span in found.of_message(index, first[0])
        if found.talk.messages[index]["role"] == "assistant" and first[0] <= span[0] < stop
    ]
    if not all(inside for _, inside in own):
        return None
    texts = sorted(span for span, _ in own)
    if not texts:
        return Block(first[0], stop, first[0], "")
    begin = found.begin(texts[0][0])
    start = begin if first[0] < begin < first[1] else first[0]
    return Block(start, stop, texts[-1][1], found.text[start : texts[0][0]])


def left_unmarked(found: Found, blocks: Sequence[Block]) -> bool:
    """Returns whether a turn to learn has texts, and none of them is in a block."""
    turns = (found.of_message(index) for index, inside in enumerate(found.talk.trained) if inside)
    return any(
        spans and not any(b.start <= low < b.stop for low, _ in spans for b in blocks)
        for spans in turns
    )
