"""A task whose answers are text, for a causal language model: nothing new in the model, the loss on
the completion.

Samples are rendered as `weft train` does it (`render`), padded on the right to the longest of their
batch. The validation score is the mean loss of a completion's token over held-out prompts, since
decoding them for every learning rate would take most of the time; the test split is decoded once,
by the task's own settings, and scored by its own metrics.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import WeftError
from ..model import prompts
from ..tasks import Encoded, GenerationRef, GenerationTask, Record, Sample, Split
from ..tasks.base import capped
from ..tasks.generation import as_samples, with_validation
from ..tasks.models import ModelRef, causal_model, check_generates, loading, quiet
from . import render
from .data import Samples
from .generate import answer, places_of
from .loop import Score, on_device
from .losses import collate, reduced
from .open_task import Facts, Tested
from .prepare import most_tokens, tokenizer_and_stops

MAX_TOKENS = 512  # of a sample, as `weft train` has it where nothing else is said
ROWS = 8  # samples or prompts at a time where nothing is trained
LOSS = "loss"


@dataclass(frozen=True)
class TokenSplit:
    """`tasks.Encoded` for rendered samples."""

    encoded: render.Encoded
    pad: int

    def __len__(self) -> int:
        return len(self.encoded)

    def _collated(self, rows: Tensor) -> dict[str, Tensor]:
        return collate([self.encoded[i] for i in rows.tolist()], self.pad)

    def batch(self, rows: Tensor) -> dict[str, Tensor]:
        held = self._collated(rows)
        del held["labels"]
        return held

    def wanted(self, rows: Tensor) -> Tensor:
        return self._collated(rows)["labels"]

    def fingerprint(self) -> str:
        return self.encoded.fingerprint()

    def by_length(self) -> Tensor:
        """Row numbers, the longest first, so that a batch has little padding."""
        return torch.tensor(
            sorted(range(len(self)), key=lambda i: (-len(self.encoded[i]["input_ids"]), i))
        )


@dataclass
class Generated:
    """`open_task.OpenTask` for prompts and completions; of `task.records["test"]` those that fit
    are answered.
    """

    model: Any
    task: GenerationTask
    renderer: render.Renderer
    train: Encoded
    validation: TokenSplit
    fits: list[bool]
    fingerprint: str
    notes: list[str]
    head: tuple[str, ...] = ()

    def facts(self) -> Facts:
        """Rates are chosen by the loss."""
        records = self.task.eval_records("test")
        settings = ", ".join(
            f"{name}={value}" for name, value in self.task.generation.items() if value is not False
        )
        how = (
            "Learning rates are chosen by the lowest mean loss of a completion's token on the "
            "validation split, because "
            f"decoding is slow; the test split is decoded with {settings} and scored by "
            f"{self.task.main_metric}."
        )
        read = [
            [self.renderer.prompt_ids(r["prompt"]), r["references"], r.get("group")]
            for r in records
        ]
        test = hashlib.sha256(
            json.dumps([read, dict(self.task.generation)], sort_keys=True).encode()
        ).hexdigest()[:16]
        return Facts(
            kind="generation",
            metric=self.task.main_metric,
            chosen_by=LOSS,
            lowest=True,
            notes=(*self.notes, how),
            sizes={
                "train": len(self.train),
                "validation": len(self.validation),
                "test": len(records),
            },
            fingerprints={
                "model": self.fingerprint,
                "train": self.train.fingerprint(),
                "validation": self.validation.fingerprint(),
                "test": test,
            },
        )

    @torch.no_grad()
    def validate(self) -> Score:
        """The mean over all tokens of all completions."""
        was_training, found = self.model.training, []
        self.model.eval()
        for rows in torch.split(self.validation.by_length(), ROWS):
            inputs, labels = on_device(self.validation, rows, self.model.device)
            with prompts.answering(self.model, labels):
                found.append(reduced(self.model(**inputs).logits, labels).sum(0))
        self.model.train(was_training)
        total, count, _ = torch.stack(found).sum(0).tolist()
        return Score(total / count, total / count)

    def test(self) -> Tested:
        """Decode and score. Raises WeftError where the task's main metric could not run."""
        records = self.task.eval_records("test")
        asked = [record["prompt"] for record, fits in zip(records, self.fits, strict=True) if fits]
        said = iter(answer(self.model, self.renderer, asked, self.task.generation, ROWS))
        texts = [next(said) if fits else "" for fits in self.fits]
        report, main = self.task.report(texts, "test"), self.task.main_metric
        score = report.scores[main]
        if score is None:
            raise WeftError(
                f"task {self.task.name!r}: {main} could not be computed: "
                f"{report.reasons.get(main, '')}"
            )
        return Tested(
            Score(score, None),
            _right(self.task, texts, records, score),
            report.scores,
            report.reasons,
        )


def _right(
    task: GenerationTask, texts: list[str], records: list[Record], score: float
) -> str | None:
    """None where the score is no mean over the examples: of data sets of several sizes it is a mean
    over the sets.
    """
    if task.right is None:
        return None
    marks = [task.right(text, record) for text, record in zip(texts, records, strict=True)]
    return (
        "".join("01"[mark] for mark in marks)
        if abs(sum(marks) / len(marks) - score) < 1e-9
        else None
    )


def _encoded(
    renderer: render.Renderer, samples: Sequence[Sample], split: str, pad: int, notes: list[str]
) -> TokenSplit:
    limit = renderer.max_length
    found = renderer.encode(
        Samples("prompt", [dict(sample) for sample in samples], split),
        split,
        f"Texts are cut off after {limit} tokens; give shorter ones, or a model that takes more.",
    )
    notes += found.counts.notes(split, f"{limit} tokens")
    return TokenSplit(found, pad)


def _fitting(
    config: Any, renderer: render.Renderer, task: GenerationTask, notes: list[str]
) -> list[bool]:
    """Which test prompts leave room for an answer in the model's positions. Raises WeftError: none
    of them, an empty one.
    """
    places, new = places_of(config), task.generation.get("max_new_tokens", 0)
    lengths = [len(renderer.prompt_ids(record["prompt"])) for record in task.eval_records("test")]
    fits = [places is None or length + new <= places for length in lengths]
    if not any(fits):
        raise WeftError(
            f"task {task.name!r}: no test prompt fits into the model's {places} positions with "
            f"{new} tokens for "
            f"an answer; the shortest has {min(lengths)}. Give a model with more positions."
        )
    if not all(fits):
        notes.append(
            f"test: {fits.count(False)} of {len(fits)} prompts do not fit into the model's "
            f"{places} positions with "
            f"{new} tokens for an answer; whatever the method, their answer is empty."
        )
    return fits


def _split(records: Sequence[Record]) -> Split:
    """With the data set that a record is of for its class, so that a part of them has as many of
    each in proportion.
    """
    groups = list(dict.fromkeys(record.get("group", "") for record in records))
    return Split(records, [groups.index(record.get("group", "")) for record in records])


def opened(ref: GenerationRef, model: ModelRef, most: Mapping[str, int | None]) -> Generated:
    """See `open_task.open_task`. The model is looked at before the data are read, and loaded behind
    them.
    """
    check_generates(model)
    with quiet(), loading(model, "a tokenizer and a configuration"):
        tokenizer, shape, stops = tokenizer_and_stops(model, model)
    task = with_validation(ref.load())
    if not task.records.get("test"):
        raise WeftError(f"task {task.name!r} has no test data; it has {sorted(task.records)}.")
    limit, notes = min(MAX_TOKENS, most_tokens(tokenizer, shape)), list(task.notes)
    renderer = render.Renderer(tokenizer, limit, stops=stops)
    pad = (
        tokenizer.pad_token_id
        if tokenizer.pad_token_id is not None
        else tokenizer.eos_token_id or 0
    )
    samples = capped(
        Split(task.train_samples(), [0] * len(task.samples)), most.get("train"), "train", notes
    ).items
    records = {
        name: capped(_split(task.eval_records(name)), most.get(name), name, notes).items
        for name in ("validation", "test")
    }
    task = replace(task, samples=samples, records=records)
    fits = _fitting(shape, renderer, task, notes)
    with quiet():
        train = _encoded(renderer, samples, "train", pad, notes)
        validation = _encoded(renderer, as_samples(records["validation"]), "validation", pad, notes)
    loaded, fingerprint = causal_model(model)
    return Generated(loaded, task, renderer, train, validation, fits, fingerprint, notes)
