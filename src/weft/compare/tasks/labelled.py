"""A task with classes or scores: the outputs of a new head, which is trained with every method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import WeftError
from ...model.structure import Structure
from ...tasks import SPLITS, Encoded, TaskRef
from ...tasks.metrics import constant
from ...tasks.models import ModelRef, Prepared, prepare
from .base import Facts, Guess, Tested
from .loop import Score, evaluate, outputs, score_of


@dataclass
class LabelledTask:
    """`base.OpenTask` for labelled examples."""

    prepared: Prepared

    def __post_init__(self) -> None:
        self.model: Any = self.prepared.model
        self.head = fresh_modules(self.prepared)

    @property
    def train(self) -> Encoded:
        """The training split."""
        return self.prepared.splits["train"]

    def facts(self) -> Facts:
        """Learning rates are chosen by the metric that is reported, on the validation split."""
        prepared, splits = self.prepared, self.prepared.splits
        return Facts(
            kind="classification" if prepared.classes else "regression",
            metric=prepared.metric,
            chosen_by=prepared.metric,
            classes=prepared.classes,
            notes=tuple(prepared.notes),
            sizes={name: len(splits[name]) for name in SPLITS},
            fingerprints={
                "model": prepared.fingerprint,
                **{name: splits[name].fingerprint() for name in SPLITS},
            },
            guess=self._guess(),
        )

    def _guess(self) -> Guess:
        labels = self.prepared.splits["test"].labels.tolist()
        answer, score = constant(self.prepared.metric, labels)
        if self.prepared.metric != "accuracy":
            what = "class" if self.prepared.classes else "number"
            return Guess(score, f"giving the same {what} to every example")
        name = self.prepared.classes[int(answer)]
        right = "".join("01"[label == answer] for label in labels)
        return Guess(score, f"giving {name!r}, the most frequent class, to every example", right)

    def validate(self) -> Score:
        """Scores the validation split."""
        return evaluate(self.model, self.prepared.splits["validation"], metric=self.prepared.metric)

    def test(self) -> Tested:
        """Scores the test split."""
        split = self.prepared.splits["test"]
        logits = outputs(self.model, split)
        right = None
        if self.prepared.metric == "accuracy":
            right = "".join("01"[int(mark)] for mark in logits.argmax(dim=1) == split.labels)
        return Tested(score_of(logits, split, self.prepared.metric), right)


def open_labelled(ref: TaskRef, model: ModelRef, limits: Mapping[str, int | None]) -> LabelledTask:
    """See `open_task.open_task`. Raises WeftError."""
    return LabelledTask(prepare(ref.load(), model, dict(limits)))


def fresh_modules(prepared: Prepared) -> tuple[str, ...]:
    """Returns the modules that every run trains from new values: the head, and those without
    tensors in the checkpoint. Raises WeftError if the model has no head.
    """
    head = Structure.of(prepared.model).head
    if not head:
        raise WeftError(
            f"{type(prepared.model).__name__} has no output head to train for "
            f"{len(prepared.classes) or 'no'} classes."
        )
    loose = [
        name
        for name in prepared.missing
        if not any(name.startswith(module + ".") for module in head)
    ]
    return tuple(dict.fromkeys([*head, *(name.rpartition(".")[0] for name in loose)]))
