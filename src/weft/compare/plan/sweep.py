"""Which runs are missing: a pure function of the request and of the finished runs.

First, every method's learning rates are tried with tuning seeds and scored on the validation split.
Then the best rate is trained with the test seeds and scored once on the test split. A tuning run
never sees the test split.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ... import methods
from .entries import GROWTH_LIMIT, Entry, next_rate
from .scale import ACCURACY, Scale

TUNING_SEEDS = (1000, 1001)
Results = Mapping[str, Mapping[str, Any]]  # key of a run -> its result


@dataclass(frozen=True)
class RunSpec:
    """Everything that defines a training run, except for model, data and versions."""

    label: str
    config: dict[str, Any]
    lr: float
    head_lr: float
    seed: int
    steps: int
    batch: int
    purpose: str  # "tune": scored on validation only; "final": scored on test too
    warm_up: float = 0.1
    weight_decay: float = 0.0
    lora_plus: float | None = None

    def key(self, context: Mapping[str, str]) -> str:
        """Returns 16 hex digits over the spec without its label, and over its context."""
        data = {k: v for k, v in asdict(self).items() if k != "label"}
        if self.lora_plus is None:  # so that runs of versions without it keep their keys
            del data["lora_plus"]
        relevant = {k: v for k, v in context.items() if k != "test" or self.purpose == "final"}
        return hashlib.sha256(json.dumps([data, relevant], sort_keys=True).encode()).hexdigest()[
            :16
        ]


@dataclass(frozen=True)
class Sweep:
    """The request, resolved for a model. `context` has fingerprints of model, splits
    and versions.
    """

    entries: Sequence[Entry]
    head: tuple[str, ...]
    seeds: int
    steps: int
    batch: int
    head_lr: float
    context: Mapping[str, str]
    warm_up: float = 0.1
    weight_decay: float = 0.0
    chosen_by: Scale = ACCURACY  # the validation score
    scored_by: Scale = ACCURACY  # the test score

    def spec(self, entry: Entry, lr: float, seed: int, purpose: str) -> RunSpec:
        """Returns the run of a row with this rate and seed."""
        config = methods.to_json(entry.with_head(self.head, seed))
        return RunSpec(
            entry.label,
            config,
            lr,
            self.head_lr,
            seed,
            entry.steps or self.steps,
            self.batch,
            purpose,
            self.warm_up,
            self.weight_decay,
            entry.lora_plus,
        )

    def key(self, spec: RunSpec) -> str:
        """Returns the key of a run in this sweep's context."""
        return spec.key(self.context)


@dataclass(frozen=True)
class Tuned:
    """State of a method's tuning. `lr` is None if runs are missing, or if every rate failed
    (`failed`).
    """

    tried: tuple[float, ...]
    # rate -> mean validation score and loss, of the rates that did not fail
    scores: Mapping[float, tuple[float, float]]
    missing: tuple[RunSpec, ...] = ()
    lr: float | None = None
    edge: bool = False
    failed: str | None = None


def tune(sweep: Sweep, entry: Entry, done: Results) -> Tuned:
    """Chooses the rate with the best mean validation score, then with the lower loss.

    The grid grows if the best rate is at its edge. The best score is the highest one, or the lowest
    one if `sweep.chosen_by.lowest`. Failures are recorded in the result; no error is raised for
    them.
    """
    sign = -1.0 if sweep.chosen_by.lowest else 1.0
    if entry.refused:
        return Tuned((), {}, failed=entry.refused)
    tried = tuple(sorted(entry.lrs))
    for turn in range(GROWTH_LIMIT + 1):
        specs = {lr: [sweep.spec(entry, lr, seed, "tune") for seed in TUNING_SEEDS] for lr in tried}
        missing = tuple(
            s
            for i in range(len(TUNING_SEEDS))
            for lr in tried
            for s in (specs[lr][i],)
            if sweep.key(s) not in done
        )
        if missing:
            return Tuned(tried, {}, missing)
        runs = {lr: [done[sweep.key(s)] for s in specs[lr]] for lr in tried}
        lost = next((run["reason"] for of in runs.values() for run in of if run.get("lost")), None)
        if lost is not None:  # the best of the other rates may not be the best of the grid
            return Tuned(tried, {}, failed=f"a tuning run was lost: {lost}")
        scores = {
            lr: _mean_validation(of)
            for lr, of in runs.items()
            if all(run["status"] == "finished" for run in of)
        }
        if not scores:
            reason = next(
                run["reason"] for of in runs.values() for run in of if run["status"] != "finished"
            )
            return Tuned(
                tried, scores, failed=f"every learning rate failed, the first with: {reason}"
            )
        best = max(scores, key=lambda lr: (sign * scores[lr][0], -scores[lr][1]))
        beyond = next_rate(tried, best) if entry.grows else None
        if beyond is None or turn == GROWTH_LIMIT:
            edge = len(tried) > 1 and best in (min(tried), max(tried))
            return Tuned(tried, scores, lr=best, edge=edge)
        tried = tuple(sorted((*tried, beyond)))
    raise RuntimeError("unreachable")


def _mean_validation(runs: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    n = len(runs)
    return sum(r["validation"]["score"] for r in runs) / n, sum(
        r["validation"]["loss"] for r in runs
    ) / n


def finals(sweep: Sweep, entry: Entry, lr: float) -> list[RunSpec]:
    """Returns the runs that are scored on the test split."""
    return [sweep.spec(entry, lr, seed, "final") for seed in range(sweep.seeds)]


def missing(sweep: Sweep, done: Results) -> list[RunSpec]:
    """Returns the runs that can start now.

    Methods alternate, so that the time left can be estimated early.
    """
    waiting: list[list[RunSpec]] = []
    for entry in sweep.entries:
        tuned = tune(sweep, entry, done)
        if tuned.missing:
            waiting.append(list(tuned.missing))
        elif tuned.lr is not None:
            waiting.append([s for s in finals(sweep, entry, tuned.lr) if sweep.key(s) not in done])
    longest = max((len(w) for w in waiting), default=0)
    return [w[i] for i in range(longest) for w in waiting if i < len(w)]


def count_runs(sweep: Sweep, done: Results) -> tuple[int, int]:
    """Returns the number of finished runs and of all runs known so far. A grid may still grow."""
    finished = total = 0
    for entry in sweep.entries:
        tuned = tune(sweep, entry, done)
        specs = [sweep.spec(entry, lr, seed, "tune") for lr in tuned.tried for seed in TUNING_SEEDS]
        specs += finals(sweep, entry, tuned.lr) if tuned.lr is not None else []
        finished += sum(sweep.key(spec) in done for spec in specs)
        total += len(tuned.tried) * len(TUNING_SEEDS) + (0 if tuned.failed else sweep.seeds)
    return finished, total
