"""A task whose answers are text, for a causal language model without a new head; the loss is on
the completion.

Samples are rendered as in `weft train`. The validation score is the mean loss per token of the
completions, since decoding for every learning rate would take most of the time. The test split is
decoded once, with the task's settings, and scored by its metrics.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...encoding.collate import collate
from ...encoding.render import Renderer
from ...encoding.rows import EncodedRows
from ...encoding.samples import Samples
from ...encoding.tokenizer import max_tokens, tokenizer_and_stops
from ...errors import WeftError
from ...inference.generate import answer
from ...model.statistics import in_eval
from ...tasks import Encoded, GenerationRef, GenerationTask, Record, Sample, Split
from ...tasks.base import capped
from ...tasks.generation import as_samples, with_validation
from ...tasks.metrics import TRIED
from ...tasks.models import ModelRef, causal_model, check_generates, loading, quiet
from ...tasks.vocabulary import check_ids, max_positions, padding
from ...training import scored
from ...training.losses import reduced
from .base import Facts, Guess, Tested
from .loop import Score, on_device

MAX_TOKENS = 512  # per sample, the default of `weft train`
ROWS = 8  # samples or prompts per batch in evaluation
LOSS = "loss"


@dataclass(frozen=True)
class TokenSplit:
    """`tasks.Encoded` for rendered samples."""

    encoded: EncodedRows
    pad: int

    def __len__(self) -> int:
        return len(self.encoded)

    def _collated(self, rows: Tensor) -> dict[str, Tensor]:
        return collate([self.encoded[i] for i in rows.tolist()], self.pad)

    def batch(self, rows: Tensor) -> dict[str, Tensor]:
        """The model's inputs for these rows [n]: input_ids and attention_mask [n, length]."""
        inputs = self._collated(rows)
        del inputs["labels"]
        return inputs

    def wanted(self, rows: Tensor) -> Tensor:
        """The labels of these rows [n], [n, length]."""
        return self._collated(rows)["labels"]

    def fingerprint(self) -> str:
        """16 hex digits over all tokens and labels, in order."""
        return self.encoded.fingerprint()

    def by_length(self) -> Tensor:
        """Returns the row numbers [rows], the longest row first, so that batches have little
        padding.
        """
        return torch.tensor(
            sorted(range(len(self)), key=lambda i: (-len(self.encoded[i]["input_ids"]), i))
        )


@dataclass
class GeneratedTask:
    """`base.OpenTask` for prompts and completions. `fits` tells which test prompts are answered."""

    model: Any
    task: GenerationTask
    renderer: Renderer
    train: Encoded
    validation: TokenSplit
    fits: list[bool]
    fingerprint: str
    notes: list[str]
    head: tuple[str, ...] = ()

    def facts(self) -> Facts:
        """Learning rates are chosen by the loss."""
        records = self.task.eval_records("test")
        settings = ", ".join(
            f"{name}={value}" for name, value in self.task.generation.items() if value is not False
        )
        how = (
            "Learning rates are chosen by the lowest mean loss per token of the completions on the "
            f"validation split, because decoding is slow; the test split is decoded with {settings} and scored by "
            f"{self.task.main_metric}."
        )
        inputs = [
            [self.renderer.prompt_ids(r["prompt"]), r["references"], r.get("group")]
            for r in records
        ]
        test = hashlib.sha256(
            json.dumps([inputs, dict(self.task.generation)], sort_keys=True).encode()
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
            guess=_guess(self.task, records),
        )

    @torch.no_grad()
    def validate(self) -> Score:
        """Returns the mean loss over all tokens of all completions of the validation split."""
        parts = []
        with in_eval(self.model):
            for rows in torch.split(self.validation.by_length(), ROWS):
                inputs, labels = on_device(self.validation, rows, self.model.device)
                with scored.answering(self.model, inputs, labels):
                    parts.append(reduced(self.model(**inputs).logits, labels).sum(0))
        total, count, _ = torch.stack(parts).sum(0).tolist()
        return Score(total / count, total / count)

    def test(self) -> Tested:
        """Decodes and scores the test split. Raises WeftError if the task's main metric could not
        run.
        """
        records = self.task.eval_records("test")
        questions = [
            record["prompt"] for record, fits in zip(records, self.fits, strict=True) if fits
        ]
        answers = iter(answer(self.model, self.renderer, questions, self.task.generation, ROWS))
        texts = [next(answers) if fits else "" for fits in self.fits]
        report, main = self.task.report(texts, "test"), self.task.main_metric
        score = report.scores[main]
        if score is None:
            raise WeftError(
                f"task {self.task.name!r}: {main} could not be computed: "
                f"{report.reasons.get(main, '')}"
            )
        return Tested(
            Score(score, None),
            _right_answers(self.task, texts, records, score),
            report.scores,
            report.reasons,
        )


def _guess(task: GenerationTask, records: list[Record]) -> Guess | None:
    """One answer for all records of a data set, the best of the most frequent ones; None if no
    single answer is right or wrong.
    """
    if task.right is None:
        return None
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.get("group", ""), []).append(record)
    marks: dict[str, list[bool]] = {}
    for group, members in groups.items():
        common = Counter(record["references"][0] for record in members).most_common(TRIED)
        tried = [[task.right(text, record) for record in members] for text, _ in common]
        marks[group] = max(tried, key=sum)
    score = sum(sum(each) / len(each) for each in marks.values()) / len(marks)
    one = next(iter(marks.values())) if len(marks) == 1 else None
    return Guess(
        score,
        "giving the same answer to every example" + ("" if one else " of a data set"),
        None if one is None else "".join("01"[mark] for mark in one),
    )


def _right_answers(
    task: GenerationTask, texts: list[str], records: list[Record], score: float
) -> str | None:
    """None if the score is not a mean over the examples: with several data sets it is a mean over
    the sets.
    """
    if task.right is None:
        return None
    marks = [task.right(text, record) for text, record in zip(texts, records, strict=True)]
    return (
        "".join("01"[mark] for mark in marks)
        if abs(sum(marks) / len(marks) - score) < 1e-9
        else None
    )


def _encode_split(
    renderer: Renderer, samples: Sequence[Sample], split: str, pad: int, notes: list[str]
) -> TokenSplit:
    limit = renderer.max_length
    found = renderer.encode(
        Samples("prompt", [dict(sample) for sample in samples], split),
        split,
        f"Texts are cut off after {limit} tokens; give shorter ones, or a model that takes more.",
    )
    notes += found.counts.notes(split, f"{limit} tokens")
    return TokenSplit(found, pad)


def _fitting(config: Any, renderer: Renderer, task: GenerationTask, notes: list[str]) -> list[bool]:
    """Which test prompts fit, with their answer, into the model's positions. Raises WeftError if
    none does.
    """
    positions, new = max_positions(config), task.generation.get("max_new_tokens", 0)
    lengths = [len(renderer.prompt_ids(record["prompt"])) for record in task.eval_records("test")]
    fits = [positions is None or length + new <= positions for length in lengths]
    if not any(fits):
        raise WeftError(
            f"task {task.name!r}: no test prompt fits into the model's {positions} positions with "
            f"{new} tokens for an answer; the shortest has {min(lengths)}. Give a model with more positions."
        )
    if not all(fits):
        notes.append(
            f"test: {fits.count(False)} of {len(fits)} prompts do not fit into the model's "
            f"{positions} positions with {new} tokens for an answer; for every method their answer "
            "is empty."
        )
    return fits


def _split(records: Sequence[Record]) -> Split:
    """The records with their data set as class, so that a part of them keeps the proportions."""
    groups = list(dict.fromkeys(record.get("group", "") for record in records))
    return Split(records, [groups.index(record.get("group", "")) for record in records])


def open_generated(
    ref: GenerationRef, model: ModelRef, limits: Mapping[str, int | None]
) -> GeneratedTask:
    """See `open_task.open_task`. The model is checked before the data are read, and loaded after
    them. Raises WeftError.
    """
    check_generates(model)
    with quiet(), loading(model, "a tokenizer and a configuration"):
        tokenizer, config, stops = tokenizer_and_stops(model, model)
    task = with_validation(ref.load())
    if not task.records.get("test"):
        raise WeftError(f"task {task.name!r} has no test data; it has {sorted(task.records)}.")
    limit, notes = min(MAX_TOKENS, max_tokens(tokenizer, config)), list(task.notes)
    renderer = Renderer(tokenizer, limit, stops=stops)
    pad, note = padding(tokenizer, config)
    notes += [] if note is None else [note]
    samples = capped(
        Split(task.train_samples(), [0] * len(task.samples)), limits.get("train"), "train", notes
    ).items
    records = {
        name: capped(_split(task.eval_records(name)), limits.get(name), name, notes).items
        for name in ("validation", "test")
    }
    task = replace(task, samples=samples, records=records)
    fits = _fitting(config, renderer, task, notes)
    with quiet():
        train = _encode_split(renderer, samples, "train", pad, notes)
        validation = _encode_split(
            renderer, as_samples(records["validation"]), "validation", pad, notes
        )
    for name, split in (("train", train), ("validation", validation)):
        ids = (row["input_ids"] for row in split.encoded.rows)
        check_ids(ids, tokenizer, config, f"{model.name}, {name} sample")
    loaded, fingerprint = causal_model(model)
    return GeneratedTask(loaded, task, renderer, train, validation, fits, fingerprint, notes)
