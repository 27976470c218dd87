"""What the user asked for, checked as far as possible without loading the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..auditing.audit import AUDIT_AFTER
from ..errors import ConfigError
from ..tasks import SPLITS, GenerationRef, ShapesRef, TaskRef, find_task
from ..tasks.models import ModelRef, find_model
from .plan.budgets import PARAMETERS, SECONDS, STEPS, Equal, check_budget
from .plan.entries import DEFAULT, Entry, parse_methods
from .run.study_location import StudyLocation
from .tasks.loop import Recipe

MODEL, TASK, OUT, SEEDS, HEAD_LR = "digits-vit", "digits", "weft-compare", 3, 1e-2
LEAST = {"steps": AUDIT_AFTER, "batch": 1, **dict.fromkeys(SPLITS, 1)}


@dataclass(frozen=True)
class Budget:
    """What is equal, the steps of a run, the examples of a step, and the largest number of examples
    of each split (None: all).
    """

    equal: Equal = field(default_factory=Equal)
    steps: int = 150
    batch: int = 20
    train: int | None = None
    validation: int | None = 1000
    test: int | None = 2000

    @property
    def limits(self) -> dict[str, int | None]:
        """The largest number of examples per split."""
        return {name: getattr(self, name) for name in SPLITS}


@dataclass(frozen=True, kw_only=True)
class Request:
    """One comparison. `entries` are its rows; if `workers` is None, their number is chosen."""

    model: ModelRef
    task: TaskRef | GenerationRef | ShapesRef
    entries: Sequence[Entry]
    seeds: int = SEEDS
    budget: Budget = field(default_factory=Budget)
    head_lr: float = HEAD_LR
    warm_up: float = Recipe.warm_up
    weight_decay: float = Recipe.weight_decay
    device: str = "auto"
    workers: int | None = None
    out: Path = Path(OUT)
    resume: bool = False
    study: tuple[str, str] | None = None  # URL and name in a database; None: a file in `out`
    retry: bool = False

    @property
    def location(self) -> StudyLocation:
        """The location of the study."""
        return (
            StudyLocation(self.out) if self.study is None else StudyLocation(self.out, *self.study)
        )

    def __post_init__(self) -> None:
        check_budget(self.budget.equal, self.entries)

    def identity(self) -> dict[str, Any]:
        """Returns the values that must be equal for --resume. Methods, rates and seeds may be
        added.
        """
        budget = {name: getattr(self.budget, name) for name in LEAST}
        test = str(self.task.test) if self.task.test is not None else None
        return {
            "model": self.model.name,
            "task": self.task.name,
            "--test": test,
            "--budget": str(self.budget.equal),
            **{f"--budget {name}": value for name, value in budget.items()},
            "--head-lr": self.head_lr,
            "--warm-up": self.warm_up,
            "--weight-decay": self.weight_decay,
        }


def default_request(**changes: Any) -> Request:
    """Returns the comparison of `weft compare` without arguments, with some fields changed."""
    given = {
        "model": find_model(MODEL),
        "task": find_task(TASK),
        "entries": parse_methods(",".join(DEFAULT)),
    }
    return Request(**{**given, **changes})


def parse_budget(text: str) -> Budget:
    """Parses `steps=150,batch=20`, `parameters=5000,train=500` or `seconds=20`.

    Raises ConfigError if a name is not known or a value is invalid.
    """
    given: dict[str, str | None] = {}
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if name not in (*LEAST, PARAMETERS, SECONDS):
            known = (*LEAST, PARAMETERS, SECONDS)
            near = get_close_matches(name, known, n=2) or list(known)
            raise ConfigError(f"--budget {text!r}: {name!r} is not known. Nearest: {near}.")
        if name in given:
            raise ConfigError(f"--budget {text!r}: {name!r} appears twice.")
        given[name] = value if equals else None
    if SECONDS in given and given.keys() & {STEPS, PARAMETERS}:
        raise ConfigError(
            f"--budget {text!r}: seconds decides the number of steps. Give steps, parameters or "
            "seconds."
        )
    whole = {
        name: _whole(text, name, value)
        for name, value in given.items()
        if name in LEAST and not (name == STEPS and value is None)
    }
    return Budget(equal=_equal(text, given), **whole)


def _equal(text: str, given: Mapping[str, str | None]) -> Equal:
    if PARAMETERS in given:
        value = given[PARAMETERS]
        return Equal(PARAMETERS, None if value is None else _whole(text, PARAMETERS, value))
    if SECONDS in given:
        try:
            seconds = float(given[SECONDS] or "")
        except ValueError:
            seconds = 0.0
        if not 0 < seconds < float("inf"):
            raise ConfigError(
                f"--budget {text!r}: seconds must be a number above 0, for example seconds=20."
            )
        return Equal(SECONDS, seconds)
    return Equal()


def _whole(text: str, name: str, value: str | None) -> int:
    least = LEAST.get(name, 1)
    if value is None or not value.isdecimal() or int(value) < least:
        raise ConfigError(f"--budget {text!r}: {name} must be a whole number, {least} or more.")
    return int(value)
