"""A task whose answers are classes or numbers: the outputs of a new head, which is trained beside
every method.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import WeftError
from ..model.structure import Structure
from ..tasks import SPLITS, Encoded, TaskRef
from ..tasks.models import ModelRef, Prepared, prepare
from .loop import Score, answers, evaluate, score_of
from .open_task import Facts, Tested


@dataclass
class Labelled:
    """`open_task.OpenTask` for labelled examples."""

    prepared: Prepared

    def __post_init__(self) -> None:
        self.model: Any = self.prepared.model
        self.head = fresh_modules(self.prepared)

    @property
    def train(self) -> Encoded:
        return self.prepared.splits["train"]

    def facts(self) -> Facts:
        """Rates are chosen by the metric that is reported, on the other split."""
        made, splits = self.prepared, self.prepared.splits
        return Facts(
            kind="classification" if made.classes else "regression",
            metric=made.metric,
            chosen_by=made.metric,
            classes=made.classes,
            notes=tuple(made.notes),
            sizes={name: len(splits[name]) for name in SPLITS},
            fingerprints={
                "model": made.fingerprint,
                **{name: splits[name].fingerprint() for name in SPLITS},
            },
        )

    def validate(self) -> Score:
        return evaluate(self.model, self.prepared.splits["validation"], metric=self.prepared.metric)

    def test(self) -> Tested:
        split = self.prepared.splits["test"]
        logits = answers(self.model, split)
        right = None
        if self.prepared.metric == "accuracy":
            right = "".join("01"[int(mark)] for mark in logits.argmax(dim=1) == split.labels)
        return Tested(score_of(logits, split, self.prepared.metric), right)


def opened(ref: TaskRef, model: ModelRef, most: Mapping[str, int | None]) -> Labelled:
    """See `open_task.open_task`."""
    return Labelled(prepare(ref.load(), model, dict(most)))


def fresh_modules(prepared: Prepared) -> tuple[str, ...]:
    """The modules that every row trains from new values: the head, and what the checkpoint has no
    tensors for.
    """
    head = Structure.of(prepared.model).head
    if not head:
        raise WeftError(
            f"{type(prepared.model).__name__} has no output head that could be trained for "
            f"{len(prepared.classes) or 'no'} classes."
        )
    loose = [
        name
        for name in prepared.missing
        if not any(name.startswith(module + ".") for module in head)
    ]
    return tuple(dict.fromkeys([*head, *(name.rpartition(".")[0] for name in loose)]))
