"""Which runs are still to be done: a function of what was asked and of what has finished, and of
nothing else.

First every method's learning rates are tried with tuning seeds and scored on the validation split.
Then the best rate is trained with the test seeds and scored once on the test split. A tuning run
never sees the test split.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .. import methods
from .entries import GROW, Entry, grown
from .scale import ACCURACY, Scale

TUNING_SEEDS = (1000, 1001)
Results = Mapping[str, Mapping[str, Any]]  # key of a run -> what was written of it


@dataclass(frozen=True)
class RunSpec:
    """Everything that defines a training run, apart from model, data and versions."""

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

    def key(self, context: Mapping[str, str]) -> str:
        """16 hex digits over the spec (its label apart) and the context it runs in."""
        data = {k: v for k, v in asdict(self).items() if k != "label"}
        held = {k: v for k, v in context.items() if k != "test" or self.purpose == "final"}
        return hashlib.sha256(json.dumps([data, held], sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Sweep:
    """What was asked, resolved against the model: `context` holds fingerprints of model, splits and
    versions.
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
        )

    def key(self, spec: RunSpec) -> str:
        return spec.key(self.context)


@dataclass(frozen=True)
class Tuned:
    """Where a method's tuning stands. `lr` is None while runs are missing, or where every rate
    failed (`failed`).
    """

    tried: tuple[float, ...]
    scores: Mapping[
        float, tuple[float, float]
    ]  # rate -> mean validation score and loss, of rates that did not fail
    missing: tuple[RunSpec, ...] = ()
    lr: float | None = None
    edge: bool = False
    failed: str | None = None


def tune(sweep: Sweep, entry: Entry, done: Results) -> Tuned:
    """Choose the rate with the best mean validation score (then the lower loss), growing the grid
    at its edges.

    The best score is the highest, or the lowest where `sweep.chosen_by` says so.
    """
    sign = -1.0 if sweep.chosen_by.lowest else 1.0
    if entry.refused:
        return Tuned((), {}, failed=entry.refused)
    tried = tuple(sorted(entry.lrs))
    for turn in range(GROW + 1):
        specs = {lr: [sweep.spec(entry, lr, seed, "tune") for seed in TUNING_SEEDS] for lr in tried}
        missing = tuple(
            s
            for place in range(len(TUNING_SEEDS))
            for lr in tried
            for s in (specs[lr][place],)
            if sweep.key(s) not in done
        )
        if missing:
            return Tuned(tried, {}, missing)
        runs = {lr: [done[sweep.key(s)] for s in specs[lr]] for lr in tried}
        lost = next((run["reason"] for of in runs.values() for run in of if run.get("lost")), None)
        if lost is not None:  # a rate chosen among the others would not be the best of the grid
            return Tuned(tried, {}, failed=f"a tuning run was lost: {lost}")
        scores = {
            lr: _mean(of)
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
        beyond = grown(tried, best) if entry.grows else None
        if beyond is None or turn == GROW:
            edge = len(tried) > 1 and best in (min(tried), max(tried))
            return Tuned(tried, scores, lr=best, edge=edge)
        tried = tuple(sorted((*tried, beyond)))
    raise RuntimeError("unreachable")


def _mean(runs: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    n = len(runs)
    return sum(r["validation"]["score"] for r in runs) / n, sum(
        r["validation"]["loss"] for r in runs
    ) / n


def finals(sweep: Sweep, entry: Entry, lr: float) -> list[RunSpec]:
    """The runs that are scored on the test split."""
    return [sweep.spec(entry, lr, seed, "final") for seed in range(sweep.seeds)]


def missing(sweep: Sweep, done: Results) -> list[RunSpec]:
    """The runs that can start now, the methods taking turns so that the time left can be told
    early.
    """
    waiting: list[list[RunSpec]] = []
    for entry in sweep.entries:
        tuned = tune(sweep, entry, done)
        if tuned.missing:
            waiting.append(list(tuned.missing))
        elif tuned.lr is not None:
            waiting.append([s for s in finals(sweep, entry, tuned.lr) if sweep.key(s) not in done])
    longest = max((len(w) for w in waiting), default=0)
    return [w[place] for place in range(longest) for w in waiting if place < len(w)]


def progress(sweep: Sweep, done: Results) -> tuple[int, int]:
    """Runs that are finished, and runs in all as far as can be told now (a grid may still grow)."""
    finished = total = 0
    for entry in sweep.entries:
        tuned = tune(sweep, entry, done)
        specs = [sweep.spec(entry, lr, seed, "tune") for lr in tuned.tried for seed in TUNING_SEEDS]
        specs += finals(sweep, entry, tuned.lr) if tuned.lr is not None else []
        finished += sum(sweep.key(spec) in done for spec in specs)
        total += len(tuned.tried) * len(TUNING_SEEDS) + (0 if tuned.failed else sweep.seeds)
    return finished, total
