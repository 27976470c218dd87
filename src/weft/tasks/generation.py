"""A generation task: training samples, records to answer, decoding, and a scorer.

It knows no model, no method and no tokenizer. A trainer tokenizes `train_samples()` with the loss
on the completion, lets the model continue each record's `prompt` with the arguments in
`generation`, and passes the text to `metrics` in the records' order.

A completion starts where its prompt ends: they are joined without a separator, so a space or line
break between them belongs to one of them. The trainer adds and strips the end-of-text token.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypedDict

from ..errors import ConfigError, WeftError
from .base import SPLIT_SEED


class Sample(TypedDict):
    """One training example."""

    prompt: str
    completion: str


class _Optional(TypedDict, total=False):
    group: str  # the record's data set, if a task has several
    completion: str  # the training completion, if it is not the first reference


class Record(_Optional):
    """One prompt with all right answers. The metric decides what similar answers are worth."""

    prompt: str
    references: list[str]


Scores = dict[str, float | None]
Scorer = Callable[[Sequence[str], Sequence[Record]], "Report"]
HELD_OUT = 0.2  # of the prompts, if a task has no validation records


@dataclass(frozen=True)
class Report:
    """Scores as the metric's own tool prints them. A metric that could not run is None, with its
    reason in `reasons`.

    `notes` say how a score was computed if that was not the usual way.
    """

    scores: Scores
    reasons: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class GenerationTask:
    """A task with text as answers.

    `samples` are for training. `records` are by split ("validation", "test"; either may be
    missing). `generation` has the keyword arguments of `model.generate`: the paper's decoding.
    `scorer` turns outputs and their records into a `Report` with `main_metric`; higher is better.
    `notes` list decisions that the user did not make. `right` returns True if an output answers its
    record, if the main metric is a mean of that.
    """

    name: str
    samples: Sequence[Sample]
    records: Mapping[str, Sequence[Record]]
    generation: Mapping[str, Any]
    main_metric: str
    scorer: Scorer
    notes: tuple[str, ...] = ()
    right: Callable[[str, Record], bool] | None = None

    def train_samples(self) -> list[Sample]:
        """Returns all samples in the order of their file. Raises WeftError if the task has no
        training data.
        """
        if not self.samples:
            cure = (
                f" {self.name}:train=validation trains on its validation part."
                if self.records.get("validation")
                else ""
            )
            raise WeftError(
                f"task {self.name!r} has no training data; it can only be evaluated.{cure}"
            )
        return list(self.samples)

    def eval_records(self, split: str) -> list[Record]:
        """Returns the records of "validation" or "test", each prompt once. Raises ConfigError if
        there is no such split.
        """
        if split not in self.records:
            raise ConfigError(
                f"task {self.name!r} has no split {split!r}. It has {sorted(self.records)}."
            )
        return list(self.records[split])

    def report(self, outputs: Sequence[str], split: str) -> Report:
        """Scores one output per record of `eval_records(split)`, in that order. Raises WeftError if
        their number differs.
        """
        records = self.eval_records(split)
        if len(outputs) != len(records):
            raise WeftError(
                f"task {self.name!r}: {len(outputs)} outputs for {len(records)} records of "
                f"{split!r}."
            )
        return self.scorer(outputs, records)

    def metrics(self, outputs: Sequence[str], split: str) -> Scores:
        """Returns the scores of `report`, without the reasons for missing ones."""
        return self.report(outputs, split).scores


def on_validation(task: GenerationTask) -> GenerationTask:
    """Returns the task with its validation part as training data, one sample per reference.

    One fifth of the prompts stays for validation. Raises WeftError if the task has training data or
    no validation part.
    """
    if task.samples:
        raise WeftError(
            f"task {task.name!r} has {len(task.samples)} training samples; remove train=validation."
        )
    if not task.records.get("validation"):
        raise WeftError(
            f"task {task.name!r} has no validation part. It has {sorted(task.records)}."
        )
    samples: list[Sample] = [
        {"prompt": record["prompt"], "completion": reference}
        for record in task.records["validation"]
        for reference in _completions(record)
    ]
    rest = {name: records for name, records in task.records.items() if name != "validation"}
    return with_validation(
        replace(task, name=f"{task.name}:train=validation", samples=samples, records=rest)
    )


def with_validation(task: GenerationTask) -> GenerationTask:
    """Returns the task itself if it has validation records.

    Otherwise one fifth of its prompts, drawn with a fixed seed, moves from training to validation.
    A prompt is never in both. Raises WeftError if there is no training data or only one prompt.
    """
    if task.records.get("validation"):
        return task
    samples = task.train_samples()
    prompts = list(dict.fromkeys(sample["prompt"] for sample in samples))
    if len(prompts) < 2:
        raise WeftError(
            f"task {task.name!r} has only one training prompt, so none can be held out for "
            "validation."
        )
    share = max(1, round(HELD_OUT * len(prompts)))
    held = set(random.Random(f"{SPLIT_SEED}/validation").sample(prompts, share))
    note = (
        f"{task.name}: validation is {len(held)} of the {len(prompts)} prompts of the training "
        "data, held out by a "
        "fixed seed with all their answers."
    )
    records = grouped(
        (sample["prompt"], sample["completion"]) for sample in samples if sample["prompt"] in held
    )
    return replace(
        task,
        samples=[sample for sample in samples if sample["prompt"] not in held],
        records={**task.records, "validation": records},
        notes=(*task.notes, note),
    )


def as_samples(records: Iterable[Record]) -> list[Sample]:
    """Returns one sample per record, with its first reference in training format, for the loss on
    held-out data.
    """
    return [
        {"prompt": record["prompt"], "completion": _completions(record)[0]} for record in records
    ]


def _completions(record: Record) -> Sequence[str]:
    return [record["completion"]] if "completion" in record else record["references"]


def grouped(pairs: Iterable[tuple[str, str]]) -> list[Record]:
    """Returns one record per prompt with all its references, in the order of first appearance."""
    found: dict[str, list[str]] = {}
    for prompt, reference in pairs:
        found.setdefault(prompt, []).append(reference)
    return [{"prompt": prompt, "references": references} for prompt, references in found.items()]


def references_only(groups: Iterable[Sequence[str]]) -> list[Record]:
    """Returns records without prompts, for scoring files."""
    return [{"prompt": "", "references": list(group)} for group in groups]
