"""A task that is open for one model: all that a training run asks of it, and nothing about methods.

A run trains an adapter on `train`, lets `validate` choose its learning rate, and calls `test` once.
`labelled` and `generated` are the two ways; a third would be a file beside them and a line in
`open_task`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..tasks import Encoded, TaskRef, find_any
from ..tasks.models import ModelRef
from .loop import Score


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the planning and the report have to know.

    kind: "classification", "regression" or "generation". metric: of the test. chosen_by: what
    `validate` returns as the score; `lowest`: less of that is better. fingerprints: of the model
    and of the splits; sizes: examples by split.
    """

    kind: str
    metric: str
    chosen_by: str
    lowest: bool = False
    classes: tuple[str, ...] = ()
    fingerprints: Mapping[str, str]
    sizes: Mapping[str, int]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tested:
    """The test split's score, all the task's metrics where there are several (None: could not run,
    and `reasons` says why), and where the score is the share of right answers, which ones are: "1"
    or "0" each, in the order of the examples.
    """

    score: Score
    right: str | None = None
    scores: Mapping[str, float | None] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)


class OpenTask(Protocol):
    """`model` is loaded and has whatever head the task needs; `head` names its modules that start
    from new values.
    """

    model: Any
    head: tuple[str, ...]

    @property
    def train(self) -> Encoded:
        """What is trained on."""
        ...

    def facts(self) -> Facts: ...
    def validate(self) -> Score:
        """Of the model as it is, on the validation split."""
        ...

    def test(self) -> Tested:
        """Of the model as it is, on the test split."""
        ...


def open_task(
    name: str, test: str | None, model: ModelRef, most: Mapping[str, int | None]
) -> OpenTask:
    """Read the data and load the model in float32. most: the largest number of examples of a split,
    by its name.

    Raises ConfigError (no such task), WeftError (the data or the model cannot be used, or do not go
    together).
    """
    from . import generated, labelled

    ref = find_any(name, test)
    return (
        labelled.opened(ref, model, most)
        if isinstance(ref, TaskRef)
        else generated.opened(ref, model, most)
    )
