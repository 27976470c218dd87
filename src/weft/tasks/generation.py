"""What a generation task is: samples to train on, records to answer, how to decode, and how to
score the answers.

It knows no model, no method and no tokenizer. A trainer tokenizes `train_samples()` with the loss
on the completion, lets the model continue each record's `prompt` with `generation`, and hands the
text back to `metrics`, in the records' order.

A completion starts where its prompt ends: the two are joined without anything between them, so a
space or line break that belongs there is in one of them. What ends an answer (the end-of-text
token) is the trainer's to add and to strip.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypedDict

from ..errors import ConfigError, WeftError
from .base import SPLIT_SEED


class Sample(TypedDict):
    """One example to train on."""

    prompt: str
    completion: str


class _Optional(TypedDict, total=False):
    group: str  # the data set that a record is of, where a task is made of several
    completion: str  # what training has the model write, where that is not the first reference


class Record(_Optional):
    """One prompt to answer, and every answer that is right; a metric decides what being near to
    them is worth.
    """

    prompt: str
    references: list[str]


Scores = dict[str, float | None]
Scorer = Callable[[Sequence[str], Sequence[Record]], "Report"]
HELD_OUT = 0.2  # of the prompts, where a task has no validation records of its own


@dataclass(frozen=True)
class Report:
    """Scores as the metric's own tool prints them. A metric that could not run is None, and
    `reasons` says why.

    notes: how a score was computed, where that was not the usual way.
    """

    scores: Scores
    reasons: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class GenerationTask:
    """A task whose answer is text.

    samples: what to train on. records: by split ("validation", "test"; either may be missing).
    generation: keyword arguments of `model.generate`, the paper's decoding. scorer: outputs and
    their records to a `Report`, which has `main_metric` among its scores; more of it is better.
    notes: what was decided without being asked. right: whether an output answers its record, where
    the main metric is a mean of that.
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
        """All samples, in the order of their file. Raises WeftError: the task was loaded without
        training data.
        """
        if not self.samples:
            cure = (
                f" {self.name}:train=validation trains on its validation part."
                if self.records.get("validation")
                else ""
            )
            raise WeftError(
                f"task {self.name!r} has no training data; it can be evaluated only.{cure}"
            )
        return list(self.samples)

    def eval_records(self, split: str) -> list[Record]:
        """The records of "validation" or "test", each prompt once. Raises ConfigError: no such
        split here.
        """
        if split not in self.records:
            raise ConfigError(
                f"task {self.name!r} has no split {split!r}. It has {sorted(self.records)}."
            )
        return list(self.records[split])

    def report(self, outputs: Sequence[str], split: str) -> Report:
        """Score one output for each of `eval_records(split)`, in that order. Raises WeftError:
        another number of them.
        """
        records = self.eval_records(split)
        if len(outputs) != len(records):
            raise WeftError(
                f"task {self.name!r}: {len(outputs)} outputs for {len(records)} records of "
                f"{split!r}."
            )
        return self.scorer(outputs, records)

    def metrics(self, outputs: Sequence[str], split: str) -> Scores:
        """The scores of `report`, without the reasons for missing ones."""
        return self.report(outputs, split).scores


def on_validation(task: GenerationTask) -> GenerationTask:
    """The task with its validation part to train on: a sample a reference; a fifth of the prompts
    stays for validation.

    Raises WeftError: it has training data of its own, or no validation part.
    """
    if task.samples:
        raise WeftError(
            f"task {task.name!r} has {len(task.samples)} samples to train on; leave "
            "train=validation out."
        )
    if not task.records.get("validation"):
        raise WeftError(
            f"task {task.name!r} has no validation part to be trained on. It has "
            f"{sorted(task.records)}."
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
    """The task itself where it has validation records; else a fifth of its prompts, drawn by a
    fixed seed, is taken from its training samples for them. A prompt is wholly on one side.

    Raises WeftError: no training data, or a single prompt.
    """
    if task.records.get("validation"):
        return task
    samples = task.train_samples()
    prompts = list(dict.fromkeys(sample["prompt"] for sample in samples))
    if len(prompts) < 2:
        raise WeftError(
            f"task {task.name!r} has one prompt to train on, so that none can be held out for "
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
    """One sample a record, with its first reference in the form that training has it; for the loss
    on held-out data.
    """
    return [
        {"prompt": record["prompt"], "completion": _completions(record)[0]} for record in records
    ]


def _completions(record: Record) -> Sequence[str]:
    return [record["completion"]] if "completion" in record else record["references"]


def grouped(pairs: Iterable[tuple[str, str]]) -> list[Record]:
    """One record a prompt, with all its references, in the order in which prompts first appear."""
    found: dict[str, list[str]] = {}
    for prompt, reference in pairs:
        found.setdefault(prompt, []).append(reference)
    return [{"prompt": prompt, "references": references} for prompt, references in found.items()]


def references_only(groups: Iterable[Sequence[str]]) -> list[Record]:
    """Records for scoring files, where nobody asks for the prompt."""
    return [{"prompt": "", "references": list(group)} for group in groups]
