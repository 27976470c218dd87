"""A task that is open for one model: all that a run needs of it, and nothing about methods.

A run trains an adapter on `train`, chooses its learning rate by `validate`, and calls `test` once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from ...tasks import Encoded
from .loop import Score


@dataclass(frozen=True)
class Guess:
    """The best score of an answer that ignores its input, on the test split.

    what: the way to it in words ("giving the same class to every example"). right: "1" or "0" per
    example, in order, if the score is their mean.
    """

    score: float
    what: str
    right: str | None = None


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What planning and report need to know.

    kind: "classification", "regression" or "generation". metric: that of the test. chosen_by: the
    name of the score of `validate`, and `lowest` if less of it is better. fingerprints: of the
    model and of the splits. sizes: examples per split. frozen: modules that no method adapts.
    guess: what any method must beat, or None if that is not known.
    """

    kind: str
    metric: str
    chosen_by: str
    lowest: bool = False
    classes: tuple[str, ...] = ()
    fingerprints: Mapping[str, str]
    sizes: Mapping[str, int]
    notes: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    guess: Guess | None = None


@dataclass(frozen=True)
class Tested:
    """The score of the test split.

    right: if the score is the share of right answers, "1" or "0" per example, in order. scores: all
    metrics if the task has several; one that could not run is None, with the cause in `reasons`.
    """

    score: Score
    right: str | None = None
    scores: Mapping[str, float | None] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)


class OpenTask(Protocol):
    """`model` is loaded and has the head that the task needs. `head` names the modules that start
    from new values.
    """

    model: Any
    head: tuple[str, ...]

    @property
    def train(self) -> Encoded:
        """The training split."""
        ...

    def facts(self) -> Facts:
        """What planning and report need to know."""
        ...

    def validate(self) -> Score:
        """Scores the present model on the validation split."""
        ...

    def test(self) -> Tested:
        """Scores the present model on the test split."""
        ...
