"""Text and conversations to tokens: what the model reads, which tokens are in the loss, and
whether every turn ends.

A sample teaches the model to stop only if the token at which generation stops is in the loss. That
token may be cut off by `max_length`, or masked (by a chat template whose `{% generation %}` block
leaves it out, or that prints none). Such samples are counted. Samples without any token in the loss
are counted and left out; it is an error if none is left. So is a text or key of a conversation that
the chat template does not render.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from ..errors import UnsupportedError, WeftError
from ..tasks.files import Row
from ..untrusted.json_text import shortened
from .borders import continued, plain_ids, with_borders
from .conversation import Conversation, asked, conversation, texts_of
from .image_files import ImageFile
from .leaves import Found, find
from .marks import marked, runs
from .rows import IGNORED, TOO_LONG, Counts, EncodedRows
from .samples import Samples
from .template import ChatTemplate, forms
from .tokenizer import has_unknown, special_start
from .turns import Turn, block_of, end_of, find_turns, left_unmarked, next_header
from .unread import PLACES, UnreadError, refuse_unread, with_others


@dataclass(frozen=True)
class Tokens:
    """One sample for a causal model. `ends` has the index of each turn's last token, or None if
    nothing ends the turn. `blank` tells of an answer that says nothing, `control` of a text with a
    special token, `unmarked` of one that the template's own block leaves out of the loss, `unknown`
    of characters that the tokenizer does not know, `excluded` of a record that takes all its
    answers out of the loss itself; `remarks` are for the preview. `images` are the pictures of the
    text, in their order.
    """

    ids: list[int]
    in_loss: list[bool]
    ends: list[int | None]
    blank: bool = False
    control: bool = False
    unmarked: bool = False
    unknown: bool = False
    excluded: bool = False
    remarks: tuple[str, ...] = ()
    images: tuple[ImageFile, ...] = ()


class Renderer:
    """Renders samples with one tokenizer. `stops` are the ids at which the model's generation
    stops, besides the special tokens; `now` is the time for templates that print the date.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_length: int,
        loss_on: str = "completion",
        template: str | None = None,
        stops: Iterable[int] = (),
        now: datetime | None = None,
    ) -> None:
        self.tokenizer, self.template = tokenizer, ChatTemplate(tokenizer, template, now)
        self.max_length, self.loss_on = max_length, loss_on
        self.stops = frozenset(stops)
        self.special = {*stops, *tokenizer.all_special_ids}
        self.start = special_start(tokenizer)

    def encode(self, samples: Samples, what: str, cure: str = TOO_LONG) -> EncodedRows:
        """Encodes all samples, cut to max_length, without those that have no token in the loss.

        Raises WeftError if none is usable, if the chat template refuses one, or if it does not
        render a part of one.
        """
        counts, rows = Counts(len(samples)), []
        for tokens in self._rendered(samples):
            counted = self._labels(tokens, counts)
            if counted is not None:
                encoded: dict[str, Any] = {
                    "input_ids": array("i", tokens.ids[: self.max_length]),
                    "labels": array("i", counted),
                }
                if tokens.remarks:
                    encoded["remarks"] = tokens.remarks
                if tokens.images:
                    encoded["images"] = tuple(image.path for image in tokens.images)
                    encoded["digests"] = tuple(image.digest for image in tokens.images)
                rows.append(encoded)
        counts.check(what, cure)
        return EncodedRows(rows, counts)

    def _rendered(self, samples: Samples) -> Iterator[Tokens]:
        """Yields the samples in tokens. Raises the UnreadError of the first sample that has one,
        with the names of some others, since one template mostly does it to many.
        """
        first: UnreadError | None = None
        others: list[str] = []
        for index, row in enumerate(samples.rows):
            name = samples.name_of(index)
            tokens = self._tried(row, samples.format, name)
            if isinstance(tokens, Tokens):
                if first is None:
                    yield tokens
            elif first is None:
                first = tokens
            else:
                others.append(name.rpartition(", ")[2])
            if len(others) == PLACES:
                break
        if first is not None:
            raise with_others(first, others, all_seen=len(others) < PLACES)

    def _tried(self, row: Row, kind: str, where: str) -> Tokens | UnreadError:
        try:
            return self.render(row, kind, where)
        except UnreadError as error:
            return error

    def _labels(self, tokens: Tokens, counts: Counts) -> list[int] | None:
        """The labels, or None if no token is in the loss. Nothing predicts position 0, so it is
        never in it.
        """
        limit = self.max_length
        counts.cut += len(tokens.ids) > limit
        counts.blank += tokens.blank
        counts.unmarked += tokens.unmarked
        counts.control += tokens.control
        counts.unknown += tokens.unknown
        lost = [
            end for end in tokens.ends if end is None or end >= limit or not tokens.in_loss[end]
        ]
        counts.excluded += tokens.excluded
        cut = any(end is not None and end >= limit for end in lost)
        missing = not cut and None in lost
        counts.end_cut += cut
        counts.end_missing += missing
        counts.end_masked += bool(lost) and not cut and not missing
        labels = [
            IGNORED if i == 0 or not inside else token
            for i, (token, inside) in enumerate(zip(tokens.ids, tokens.in_loss, strict=True))
        ][:limit]
        if all(label == IGNORED for label in labels):
            counts.empty += 1
            return None
        return labels

    def render(self, row: Row, kind: str, where: str = "a sample") -> Tokens:
        """Renders one sample, without cutting it. `where` names it in errors. Raises WeftError."""
        if kind == "messages":
            return self._chat(row, where)
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise WeftError(
                "the tokenizer has no eos token, so no sample could end. Set eos_token in its "
                "configuration."
            )
        given = row["prompt"] if kind == "prompt" else ""
        text = row["completion"] if kind == "prompt" else row["text"]
        before, answer, remarks = continued(self.tokenizer, given, text)
        prompt, learnt = [*self.start, *before], [*answer, eos]
        everything = self.loss_on == "all" or kind == "text"
        ids = prompt + learnt
        return Tokens(
            ids,
            [everything] * len(prompt) + [True] * len(learnt),
            [len(ids) - 1],
            not text.strip(),
            unknown=has_unknown(self.tokenizer, ids, (given, text)),
            remarks=tuple(remarks),
        )

    def chat_prompt(self, messages: list[dict[str, Any]]) -> str:
        """Returns a conversation as text, up to the beginning of the assistant's answer. Raises
        WeftError if there is no chat template.
        """
        return self.chat_prompt_of(asked(messages))

    def chat_prompt_of(self, talk: Conversation) -> str:
        """Returns a conversation that waits for an answer as text, as `chat_prompt` does. Raises
        WeftError, too, if the text lacks something that was said.
        """
        refused, lost = None, ""
        for form in forms(talk):
            try:
                text = self.template.prompt(form)
            except WeftError as error:
                refused = refused or error
                continue
            said = [t for n, t in texts_of(talk) if talk.messages[n - 1]["role"] != "assistant"]
            lost = next((each for each in said if each.strip() not in text), "")
            if not lost:
                return text
        if not lost and refused is not None:
            raise refused
        raise WeftError(
            f"the chat template does not render {shortened(lost)} as it is written, or not at all. "
            "Give a template that does."
        )

    def bare(self) -> Renderer:
        """Returns a renderer that adds no start token, for the output of a chat template."""
        renderer = Renderer(
            self.tokenizer,
            self.max_length,
            self.loss_on,
            self.template.given,
            self.stops,
            self.template.now,
        )
        renderer.start = []
        return renderer

    def prompt_ids(self, text: str) -> list[int]:
        """Returns the tokens of a prompt: the tokenizer's start (a bos token, or nothing) and the
        text.
        """
        return [*self.start, *plain_ids(self.tokenizer, text)]

    def _chat(self, row: Row, where: str) -> Tokens:
        talk = self._conversation(row, where)
        if self.loss_on == "all" and talk.left_out:
            raise WeftError(
                f"{where}: message {talk.left_out[0] + 1} is taken out of the loss (weight or "
                "train), and data.loss_on=all puts everything into it. Take one of them."
            )
        found = self._found(talk, where)
        if self.template.marks_turns(found.talk.tools):
            tokens = self._marked_turns(found)
        else:
            tokens = self._located_turns(found, where)
        return tokens

    def _conversation(self, row: Row, where: str) -> Conversation:
        return conversation(row, where)

    def _found(self, talk: Conversation, where: str) -> Found:
        """The rendered conversation, in the first form that the template renders whole. Raises
        WeftError, with what is wrong with the record's own form, if there is none.
        """
        refused: list[WeftError] = []
        rendered: list[Found] = []
        for form in forms(talk):
            found = self._attempt(form, refused)
            if found is not None and not found.unread:
                return found
            rendered += [] if found is None else [found]
        if not rendered:
            raise WeftError(f"{where}: {refused[0]}")
        refuse_unread(min(rendered, key=lambda found: len(found.unread)), where)
        raise AssertionError  # that found has something unread

    def _attempt(self, talk: Conversation, refused: list[WeftError]) -> Found | None:
        """None, with the reason added to `refused`, if the template refuses this form."""
        try:
            return find(talk, self.template.render)
        except WeftError as error:
            refused.append(error)
            return None

    def _marked_turns(self, found: Found) -> Tokens:
        """Takes the loss from the template's {% generation %} blocks."""
        out = self.template.render(
            found.talk,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True},
        )
        places = self.template.places(found.talk, out["offset_mapping"])
        spans = runs([bool(m) for m in out["assistant_masks"]])
        blocks = [
            block
            for start, stop in spans
            if (block := block_of(found, places[start], places[stop - 1][1])) is not None
        ]
        borders = [block.start for block in blocks]
        ids, offsets, remarks = with_borders(self.tokenizer, found.text, borders, self.special)
        in_loss = [False] * len(ids)
        ends: list[int | None] = []
        for block in blocks:
            chosen = [
                t
                for t, (start, stop) in enumerate(offsets)
                if start < block.stop and stop > block.start
            ]
            for token in chosen:
                in_loss[token] = True
            ends.append(self._end_in(ids, offsets, chosen, block.content_end))
        inserted = [block.inserted for block in blocks]
        made = self._tokens(found, ids, in_loss, ends, inserted, remarks)
        return replace(made, unmarked=left_unmarked(found, blocks))

    def _end_in(
        self, ids: list[int], offsets: list[tuple[int, int]], chosen: list[int], after: int
    ) -> int | None:
        """The index of the token that ends a turn with these tokens in the loss: among those whose
        text begins at `after` or later, or the one that follows them.
        """
        own = [t for t in chosen if offsets[t][0] >= after and ids[t] in self.special]
        if own:
            return next((t for t in own if ids[t] in self._stopping), own[-1])
        following = chosen[-1] + 1 if chosen else len(ids)
        return following if following < len(ids) and ids[following] in self.special else None

    @property
    def _stopping(self) -> set[int]:
        return {*self.stops, self.tokenizer.eos_token_id}

    def _located_turns(self, found: Found, where: str) -> Tokens:
        """Finds the turns by rendering the conversation up to each of them."""
        if not self.tokenizer.is_fast:
            raise UnsupportedError(
                f"{type(self.tokenizer).__name__} does not return the offsets of its tokens in the "
                "text. Use a chat template with a {% generation %} block."
            )
        try:
            turns = find_turns(found, self.template)
        except WeftError as error:
            raise WeftError(f"{where}: {error}") from None
        ids, offsets, remarks = with_borders(
            self.tokenizer, found.text, [turn.start for turn in turns], self.special
        )
        in_loss: list[bool] = [False] * len(ids)
        ends: list[int | None] = []
        stopping = self._stopping
        for turn in turns:
            end = end_of(turn, ids, offsets, self.special, stopping)
            last = turn.content_end + turn.close if end is None else offsets[end][1]
            for t, (start, stop) in enumerate(offsets):
                in_loss[t] |= start < last and stop > turn.start
            if end is None and turn.next == len(found.text) == last:
                end = self._added_end(found, turn, ids, in_loss, stopping)
            ends.append(end)
        inserted = [turn.inserted for turn in turns]
        return self._tokens(found, ids, in_loss, ends, inserted, remarks)

    def _added_end(
        self, found: Found, turn: Turn, ids: list[int], in_loss: list[bool], stopping: set[int]
    ) -> int | None:
        """Adds the token that the template would print next, if generation stops at it."""
        header = plain_ids(self.tokenizer, next_header(found, self.template))
        token = next((token for token in header if token in self.special), None)
        if token is None or token not in stopping:
            return None
        ids.append(token)
        in_loss.append(True)
        return len(ids) - 1

    def _tokens(
        self,
        found: Found,
        ids: list[int],
        in_loss: list[bool],
        ends: list[int | None],
        inserted: list[str],
        remarks: list[str],
    ) -> Tokens:
        added = list(dict.fromkeys(text for text in inserted if text.strip()))
        remarks = [
            *remarks,
            *(f"in the loss, but added by the chat template itself: {text!r}" for text in added),
        ]
        if self.loss_on == "all":
            in_loss = [True] * len(ids)
        return Tokens(
            ids,
            in_loss,
            ends,
            found.talk.blank(),
            self._has_control(found),
            unknown=has_unknown(self.tokenizer, ids, [found.text]),
            excluded=bool(found.talk.left_out) and not any(found.talk.trained),
            remarks=tuple(remarks),
        )

    def _has_control(self, found: Found) -> bool:
        """Whether a message says a special token, such as the one that ends turns."""
        said = "\n".join(
            found.text[low:high] for spans in found.spans.values() for low, high in spans
        )
        return any(token in said for token in self.tokenizer.all_special_tokens)


__all__ = ["Renderer", "Tokens", "marked"]
