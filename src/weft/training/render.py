"""From samples to tokens: what the model reads, which tokens are in the loss, and whether every
turn ends.

A sample teaches the model to stop only if the token at which generation stops is in the loss. It
may be cut off by `max_length`, or masked (by a chat template whose `{% generation %}` block leaves
it out, or that prints none). Such samples are counted; samples with no token in the loss are
counted and left out; if that is all of them, it is an error.
"""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from ..errors import UnsupportedError, WeftError
from .data import Row, Samples

IGNORED = -100
TOO_LONG = "Raise data.max_length, or see with --preview what is masked."
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Tokens:
    """One sample for a causal model. `ends`: where its turns end (None: nothing ends one)."""

    ids: list[int]
    in_loss: list[bool]
    ends: list[int | None]


@dataclass
class Counts:
    """What is wrong with how many samples."""

    samples: int = 0
    cut: int = 0  # longer than max_length
    end_cut: int = 0
    end_masked: int = 0
    empty: int = 0

    def notes(self, what: str, limit: str = "data.max_length") -> list[str]:
        """One line for each thing that happened."""
        said = (
            (self.cut, f"longer than {limit} and cut off"),
            (
                self.end_cut,
                "whose end-of-turn token was cut off: they do not teach the model to stop",
            ),
            (
                self.end_masked,
                "whose end-of-turn token is not in the loss: they do not teach the model to stop",
            ),
            (self.empty, "with no token in the loss, left out"),
        )
        return [f"{what}: {n} of {self.samples} samples {text}." for n, text in said if n]

    def check(self, what: str, cure: str = TOO_LONG) -> None:
        """Raises WeftError if no sample is sound; `cure` says what to do where samples are too
        long.
        """
        if self.empty >= self.samples:
            raise WeftError(
                f"{what}: none of the {self.samples} samples has a token in the loss. {cure}"
            )
        if self.end_cut + self.end_masked >= self.samples:
            cure = (
                cure
                if self.end_cut >= self.end_masked
                else "The chat template must close assistant turns with a special token, inside {% "
                "generation %} where it has "
                "that block."
            )
            raise WeftError(
                f"{what}: in none of the {self.samples} samples the end-of-turn token is in the "
                "loss "
                f"({self.end_cut} cut off, {self.end_masked} masked), so the model would not learn "
                "to stop. "
                f"{cure}"
            )


@dataclass(frozen=True)
class Encoded:
    """Samples ready for a collator: input_ids, labels (as many, or one number), token_type_ids
    where a model has them.

    Tokens lie in arrays: a list of Python's numbers takes eight times the memory.
    """

    rows: list[dict[str, Any]]
    counts: Counts = field(default_factory=Counts)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> dict[str, Any]:
        return self.rows[place]

    def fingerprint(self) -> str:
        """16 hex digits over all tokens and labels, in order."""
        sha = hashlib.sha256()
        for row in self.rows:
            sha.update(
                json.dumps(
                    [
                        list(v) if isinstance(v, array) else v
                        for v in (row["input_ids"], row["labels"])
                    ]
                ).encode()
            )
        return sha.hexdigest()[:16]


class Renderer:
    """Samples to tokens with one tokenizer. `stops`: ids at which the model's generation stops,
    besides the special ones.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_length: int,
        loss_on: str = "completion",
        template: str | None = None,
        stops: Iterable[int] = (),
    ) -> None:
        self.tokenizer, self.max_length, self.loss_on, self.template = (
            tokenizer,
            max_length,
            loss_on,
            template,
        )
        self.stops = frozenset(stops)
        self.ends = {*stops, *tokenizer.all_special_ids}
        self.start = _special_start(tokenizer)

    def encode(self, samples: Samples, what: str, cure: str = TOO_LONG) -> Encoded:
        """All samples, cut to max_length; those without a token in the loss are left out. Raises
        WeftError.
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
        return Encoded(rows, counts)

    def _labels(self, tokens: Tokens, counts: Counts) -> list[int] | None:
        """Position 0 predicts nothing and is no label."""
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
        """One sample, not cut."""
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
        """A conversation as text, up to where the assistant answers. Raises WeftError: no chat
        template.
        """
        self._template()
        return self._text(messages, True)

    def bare(self) -> Renderer:
        """The same without the tokenizer's own start, for text that a chat template has made."""
        made = Renderer(self.tokenizer, self.max_length, self.loss_on, self.template, self.stops)
        made.start = []
        return made

    def prompt_ids(self, text: str) -> list[int]:
        """What the model reads before it answers: the tokenizer's own start (a bos token, or
        nothing), and the text.
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
        """Of a turn that the template's mask ends at `stop`: the token that ends it, within the
        mask or just behind it.
        """
        return next(
            (place for place in (stop - 1, stop) if place < len(ids) and ids[place] in self.ends),
            None,
        )

    def _turns(
        self, messages: list[dict[str, Any]]
    ) -> tuple[list[int], list[bool], list[int | None]]:
        """Assistant turns found by rendering the conversation up to each of them; a turn goes to
        the token that ends it.
        """
        if not self.tokenizer.is_fast:
            raise UnsupportedError(
                f"{type(self.tokenizer).__name__} does not say where its tokens lie in the text. "
                "Use a "
                "chat template with a {% generation %} block."
            )
        text = self._text(messages)
        coded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, places = list(coded["input_ids"]), coded["offset_mapping"]
        in_loss: list[bool] = [False] * len(ids)
        ends: list[int | None] = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, after = self._text(messages[:i], True), self._text(messages[: i + 1])
            if not (text.startswith(after) and after.startswith(before)):
                raise WeftError(
                    f"the chat template renders the conversation up to message {i + 1} otherwise "
                    "than within "
                    "the whole, so where that turn lies is not known. Use a template with a {% "
                    "generation %} "
                    "block."
                )
            turn = [t for t, (start, _) in enumerate(places) if len(before) <= start < len(after)]
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


def encode_labels(
    samples: Samples, tokenizer: Any, max_length: int, classes: Sequence[str] | None
) -> Encoded:
    """For classification (labels are places in `classes`) and regression (classes is None, labels
    are numbers).
    """
    place = {name: i for i, name in enumerate(classes or ())}
    rows, counts = [], Counts(len(samples))
    for number, row in enumerate(samples.rows, 1):
        where = f"{samples.source}, sample {number}"
        coded = tokenizer(*row["texts"], truncation=True, max_length=max_length)
        value: Any
        if classes is None:
            value = _number(row["label"], where)
        elif str(row["label"]) in place:
            value = place[str(row["label"])]
        else:
            raise WeftError(
                f"{where}: label {row['label']!r} is none of the {len(place)} classes "
                f"{list(place)[:8]}."
            )
        rows.append(
            {
                "input_ids": array("i", coded["input_ids"]),
                "labels": value,
                **(
                    {"token_type_ids": array("i", coded["token_type_ids"])}
                    if "token_type_ids" in coded
                    else {}
                ),
            }
        )
        counts.cut += (
            len(coded["input_ids"]) >= max_length
            and len(tokenizer(*row["texts"])["input_ids"]) > max_length
        )
    return Encoded(rows, counts)


def classes_of(samples: Samples) -> tuple[str, ...]:
    """The labels that occur, sorted; as numbers where all are whole numbers."""
    names = {str(row["label"]) for row in samples.rows}
    whole = all(re.fullmatch(r"-?\d+", name) for name in names)
    return tuple(sorted(names, key=int) if whole else sorted(names))


def runs(marks: Sequence[bool]) -> list[tuple[int, int]]:
    """Start and stop of every unbroken stretch of True."""
    edges = [
        i
        for i in range(len(marks) + 1)
        if (i < len(marks) and marks[i]) != (i > 0 and marks[i - 1])
    ]
    return list(zip(edges[::2], edges[1::2], strict=True))


def marked(tokenizer: Any, ids: Sequence[int], labels: Sequence[int]) -> str:
    """The sample as text, with what is in the loss between ⟦ and ⟧."""
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


def _number(value: Any, where: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise WeftError(
            f"{where}: label {value!r} is no number, and model.kind is regression."
        ) from None


def _special_start(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text (a bos token, or nothing)."""
    whole, bare = (
        list(tokenizer("a")["input_ids"]),
        list(tokenizer("a", add_special_tokens=False)["input_ids"]),
    )
    return next((whole[:i] for i in range(len(whole)) if whole[i : i + len(bare)] == bare), [])
