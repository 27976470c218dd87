"""Text and conversations to tokens: what the model reads, which tokens are in the loss, and
whether every turn ends.

A sample teaches the model to stop only if the token at which generation stops is in the loss. That
token may be cut off by `max_length`, or masked (by a chat template whose `{% generation %}` block
leaves it out, or that prints none). Such samples are counted. Samples without any token in the loss
are counted and left out; it is an error if none is left.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ..errors import UnsupportedError, WeftError
from ..tasks.files import Row
from .rows import IGNORED, TOO_LONG, Counts, EncodedRows
from .samples import Samples

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Tokens:
    """One sample for a causal model. `ends` has the index of each turn's last token, or None if
    nothing ends the turn.
    """

    ids: list[int]
    in_loss: list[bool]
    ends: list[int | None]


class Renderer:
    """Renders samples with one tokenizer. `stops` are the ids at which the model's generation
    stops, besides the special tokens.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_length: int,
        loss_on: str = "completion",
        template: str | None = None,
        stops: Iterable[int] = (),
    ) -> None:
        self.tokenizer, self.template = tokenizer, template
        self.max_length, self.loss_on = max_length, loss_on
        self.stops = frozenset(stops)
        self.ends = {*stops, *tokenizer.all_special_ids}
        self.start = _special_start(tokenizer)

    def encode(self, samples: Samples, what: str, cure: str = TOO_LONG) -> EncodedRows:
        """Encodes all samples, cut to max_length, without those that have no token in the loss.

        Raises WeftError if none is usable, or if the chat template refuses one.
        """
        counts, rows = Counts(len(samples)), []
        for row in samples.rows:
            tokens = self.render(row, samples.format)
            counted = self._labels(tokens, counts)
            if counted is not None:
                rows.append(
                    {
                        "input_ids": array("i", tokens.ids[: self.max_length]),
                        "labels": array("i", counted),
                    }
                )
        counts.check(what, cure)
        return EncodedRows(rows, counts)

    def _labels(self, tokens: Tokens, counts: Counts) -> list[int] | None:
        """The labels, or None if no token is in the loss. Nothing predicts position 0, so it is
        never in it.
        """
        limit = self.max_length
        counts.cut += len(tokens.ids) > limit
        lost = [
            end for end in tokens.ends if end is None or end >= limit or not tokens.in_loss[end]
        ]
        counts.end_cut += any(end is not None and end >= limit for end in lost)
        counts.end_masked += bool(lost) and not any(
            end is not None and end >= limit for end in lost
        )
        labels = [
            IGNORED if i == 0 or not inside else token
            for i, (token, inside) in enumerate(zip(tokens.ids, tokens.in_loss, strict=True))
        ][:limit]
        if all(label == IGNORED for label in labels):
            counts.empty += 1
            return None
        return labels

    def render(self, row: Row, kind: str) -> Tokens:
        """Renders one sample, without cutting it. Raises WeftError."""
        if kind == "messages":
            return self._chat(row["messages"])
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise WeftError(
                "the tokenizer has no eos token, so no sample could end. Set eos_token in its "
                "configuration."
            )
        prompt = self.prompt_ids(row["prompt"] if kind == "prompt" else "")
        learnt = [*self._ids(row["completion"] if kind == "prompt" else row["text"]), eos]
        everything = self.loss_on == "all" or kind == "text"
        ids = prompt + learnt
        return Tokens(ids, [everything] * len(prompt) + [True] * len(learnt), [len(ids) - 1])

    def chat_prompt(self, messages: list[dict[str, Any]]) -> str:
        """Returns a conversation as text, up to the beginning of the assistant's answer. Raises
        WeftError if there is no chat template.
        """
        self._template()
        return self._text(messages, True)

    def bare(self) -> Renderer:
        """Returns a renderer that adds no start token, for the output of a chat template."""
        renderer = Renderer(
            self.tokenizer, self.max_length, self.loss_on, self.template, self.stops
        )
        renderer.start = []
        return renderer

    def prompt_ids(self, text: str) -> list[int]:
        """Returns the tokens of a prompt: the tokenizer's start (a bos token, or nothing) and the
        text.
        """
        return [*self.start, *self._ids(text)]

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    def _chat(self, messages: list[dict[str, Any]]) -> Tokens:
        if _GENERATION.search(self._template()):
            out = self.tokenizer.apply_chat_template(
                messages,
                chat_template=self.template,
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
            ids, in_loss = list(out["input_ids"]), [bool(m) for m in out["assistant_masks"]]
            ends = [self._end_near(ids, stop) for _, stop in runs(in_loss)]
        else:
            ids, in_loss, ends = self._turns(messages)
        if self.loss_on == "all":
            in_loss = [True] * len(ids)
        return Tokens(ids, in_loss, ends)

    def _template(self) -> str:
        source = self.template or getattr(self.tokenizer, "chat_template", None)
        if not source:
            raise WeftError(
                "messages need a chat template, and the tokenizer has none. Give one in a file: "
                "data.chat_template, or --chat-template of weft judge."
            )
        return str(source)

    def _end_near(self, ids: Sequence[int], stop: int) -> int | None:
        """The index of the token that ends a turn whose mask ends at `stop`: the last in the mask,
        or the one after it.
        """
        return next((i for i in (stop - 1, stop) if i < len(ids) and ids[i] in self.ends), None)

    def _turns(
        self, messages: list[dict[str, Any]]
    ) -> tuple[list[int], list[bool], list[int | None]]:
        """Finds assistant turns by rendering the conversation up to each of them. A turn includes
        the token that ends it.
        """
        if not self.tokenizer.is_fast:
            raise UnsupportedError(
                f"{type(self.tokenizer).__name__} does not return the offsets of its tokens in the "
                "text. Use a chat template with a {% generation %} block."
            )
        text = self._text(messages)
        coded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = list(coded["input_ids"]), coded["offset_mapping"]
        in_loss: list[bool] = [False] * len(ids)
        ends: list[int | None] = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, after = self._text(messages[:i], True), self._text(messages[: i + 1])
            if not (text.startswith(after) and after.startswith(before)):
                raise WeftError(
                    f"the chat template renders the conversation up to message {i + 1} differently "
                    "from the same messages within the whole, so that turn cannot be located. Use "
                    "a template with a {% generation %} block."
                )
            turn = [t for t, (start, _) in enumerate(offsets) if len(before) <= start < len(after)]
            end = max((t for t in turn if ids[t] in self.ends), default=None)
            ends.append(end)
            for t in turn:
                in_loss[t] = end is None or t <= end
        return ids, in_loss, ends

    def _text(self, messages: list[dict[str, Any]], prompt: bool = False) -> str:
        try:
            return (
                str(
                    self.tokenizer.apply_chat_template(
                        messages,
                        chat_template=self.template,
                        tokenize=False,
                        add_generation_prompt=prompt,
                    )
                )
                if messages
                else ""
            )
        except Exception as error:  # jinja's own errors, and raise_exception of the template
            raise WeftError(
                f"the chat template refuses a conversation with the roles "
                f"{[m['role'] for m in messages]}: {error}"
            ) from error


def runs(marks: Sequence[bool]) -> list[tuple[int, int]]:
    """Returns the start and the stop of every run of True."""
    edges = [
        i
        for i in range(len(marks) + 1)
        if (i < len(marks) and marks[i]) != (i > 0 and marks[i - 1])
    ]
    return list(zip(edges[::2], edges[1::2], strict=True))


def marked(tokenizer: Any, ids: Sequence[int], labels: Sequence[int]) -> str:
    """Returns the sample as text, with the tokens in the loss between ⟦ and ⟧."""
    out, done = "", ""
    inside = [label != IGNORED for label in labels]
    borders = sorted({0, len(ids), *(edge for run in runs(inside) for edge in run)})
    for start, stop in pairwise(borders):
        text = tokenizer.decode(
            list(ids[:stop]), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        piece = text[len(done) :]
        out += f"⟦{piece}⟧" if inside[start] else piece
        done = text
    return out


def _special_start(tokenizer: Any) -> list[int]:
    """The tokens that the tokenizer puts before a text: a bos token, or nothing."""
    whole, bare = (
        list(tokenizer("a")["input_ids"]),
        list(tokenizer("a", add_special_tokens=False)["input_ids"]),
    )
    return next((whole[:i] for i in range(len(whole)) if whole[i : i + len(bare)] == bare), [])
