"""The results of a comparison: one `Row` per method, its `Run`s, and what the report needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import mean
from typing import Any

from ..plan.budgets import PARAMETERS, SECONDS
from ..plan.entries import Entry, format_rate
from ..plan.scale import ACCURACY, Scale
from ..plan.sweep import TUNING_SEEDS, Results, RunSpec, Sweep, finals, tune
from ..tasks.base import Guess
from .examples import Gap, gap, shares
from .statistics import Ranking, rank, t_interval


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run. `validation` and `test` are scores, or None if it failed before; `reason`
    is why.
    """

    purpose: str
    lr: float
    seed: int
    steps: int
    validation: float | None
    test: float | None
    seconds: float | None
    reason: str | None
    attempts: int = 1
    earlier: Sequence[str] = ()  # reasons why earlier attempts failed
    # of the test split, if the task has several metrics
    scores: Mapping[str, float | None] = field(default_factory=dict)

    @property
    def status(self) -> str:
        """ "finished" or "failed"."""
        return "finished" if self.reason is None else "failed"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method. `scores` has one entry per seed, None if that run failed. `trainable` is without
    the head.
    """

    label: str
    config: Mapping[str, Any]
    # learning rate -> mean validation score, None if a run with it failed
    tried: Mapping[float, float | None]
    lr: float | None = None
    scores: Sequence[float | None] = ()
    curves: Sequence[Sequence[float]] = ()  # training loss of every step, by seed
    trainable: int | None = None
    head_trainable: int | None = None
    nbytes: int | None = None
    cost: Mapping[str, Any] = field(default_factory=dict)  # result of TrialRunner.measure
    # by seed: "1" or "0" per test example, if the score is their mean
    right: Sequence[str] = ()
    steps: int | None = None  # per run
    runs: Sequence[Run] = ()
    adapter: str | None = None  # folder of the first seed's adapter
    reason: str | None = None  # why the row failed

    @property
    def status(self) -> str:
        """ "finished" or "failed"."""
        return "finished" if self.reason is None else "failed"

    @property
    def complete(self) -> list[float] | None:
        """The scores if every seed has one, else None."""
        scores = [score for score in self.scores if score is not None]
        return scores if scores and len(scores) == len(self.scores) else None

    @property
    def metrics(self) -> dict[str, list[float | None]]:
        """All metrics of the test split by name, one score per seed. Empty if the table's metric is
        the only one.
        """
        final = [run.scores for run in self.runs if run.purpose == "final"]
        names = dict.fromkeys(name for scores in final for name in scores)
        return {name: [scores.get(name) for scores in final] for name in names}

    @property
    def mean(self) -> float | None:
        """The mean score, or None if a seed has none."""
        return mean(self.complete) if self.complete else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % t-interval of the mean, or None for fewer than two scores."""
        return t_interval(self.complete) if self.complete else None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All rows, in the order of the request."""

    task: str
    model: str
    rows: Sequence[Row]
    seeds: int
    # budget, steps (None: each row has its own), batch, head_lr; parameters or seconds
    settings: Mapping[str, Any]
    sizes: Mapping[str, int]  # examples by split
    classes: Sequence[str]
    head: Sequence[str]
    device: str
    versions: Mapping[str, str]
    notes: Sequence[str]
    metric: str = "accuracy"
    kind: str = "classification"
    chosen_by: Scale = ACCURACY  # of the validation score
    guess: Guess | None = None

    @property
    def scored_by(self) -> Scale:
        """The scale of the test score."""
        return Scale(self.metric)

    @property
    def metrics(self) -> list[str]:
        """The names of all metrics of the test split. Empty if the table's metric is
        the only one.
        """
        return list(dict.fromkeys(name for row in self.rows for name in row.metrics))

    @property
    def ok(self) -> bool:
        """True if every row finished."""
        return all(row.status == "finished" for row in self.rows)

    @property
    def head_trainable(self) -> int | None:
        """The number of parameters of the head, which every row trains."""
        return next(
            (row.head_trainable for row in self.rows if row.head_trainable is not None), None
        )

    def ranking(self) -> Ranking | None:
        """Returns the ranking of the rows with a score for every seed, or None for too few seeds or
        rows.
        """
        return self._ranking

    @cached_property
    def _ranking(self) -> Ranking | None:
        scored = {row.label: row for row in self.rows if row.complete and row.nbytes is not None}
        answers = {
            label: row.right for label, row in scored.items() if len(row.right) == self.seeds
        }
        alike = len({len(seed) for right in answers.values() for seed in right}) == 1
        return rank(
            {label: row.complete or [] for label, row in scored.items()},
            {label: (row.trainable or 0, row.nbytes or 0) for label, row in scored.items()},
            {label: list(shares(right)) for label, right in answers.items()} if alike else None,
        )

    @property
    def budget(self) -> str:
        """What is equal for all rows, in words."""
        batch = min(self.settings["batch"], self.sizes["train"])
        if self.settings["budget"] == SECONDS:
            return f"budget: equal wall-clock, {self.settings['seconds']:g} s per run, steps of {batch}"
        steps = f"{self.settings['steps']} steps of {batch}"
        if self.settings["budget"] == PARAMETERS:
            return f"budget: equal trainable parameters, about {self.settings['parameters']:,}, and {steps}"
        return f"budget: equal steps, {steps}"

    @cached_property
    def gaps(self) -> dict[str, Gap]:
        """The gap of every row to the highest mean on the test examples, if the
        answers are known.
        """
        scored = [row for row in self.rows if row.complete and len(row.right) == self.seeds]
        ranking = self.ranking()
        name = (
            ranking.best
            if ranking
            else max(scored, key=lambda row: row.mean or 0.0).label
            if scored
            else None
        )
        best = next((row for row in scored if row.label == name), None)
        gaps = (
            {row.label: gap(best.right, row.right) for row in scored if row is not best}
            if best
            else {}
        )
        return {label: gap for label, gap in gaps.items() if gap is not None}

    def row(self, label: str) -> Row:
        """Returns the row of this label."""
        return next(row for row in self.rows if row.label == label)


def row_of(
    sweep: Sweep, entry: Entry, done: Results, cost: Mapping[str, Any] | None, adapter: str | None
) -> Row:
    """Returns the row of one method. All its runs must be in `done`; `cost` is None if it was not
    measured.
    """
    tuned = tune(sweep, entry, done)
    tried = {lr: tuned.scores[lr][0] if lr in tuned.scores else None for lr in tuned.tried}
    spec = sweep.spec(entry, 0.0, 0, "final")
    config, steps, ran = spec.config, spec.steps, runs_of(sweep, entry, done)
    if tuned.lr is None:
        return Row(
            label=entry.label,
            config=config,
            tried=tried,
            scores=[None] * sweep.seeds,
            reason=tuned.failed,
            steps=None if entry.refused else steps,
            runs=ran,
        )
    runs = [done[sweep.key(spec)] for spec in finals(sweep, entry, tuned.lr)]
    first = next((run for run in runs if "trainable" in run), {})
    failed = next(
        (
            f"seed {seed}: {run['reason']}"
            for seed, run in enumerate(runs)
            if run["status"] != "finished"
        ),
        None,
    )
    if failed is None and cost is not None and cost.get("status") == "failed":
        failed = f"it could not be measured: {cost['reason']}"
    return Row(
        label=entry.label,
        config=config,
        tried=tried,
        lr=tuned.lr,
        scores=[run["test"]["score"] if run["status"] == "finished" else None for run in runs],
        curves=[run["losses"] for run in runs if run["status"] == "finished"],
        trainable=first.get("trainable"),
        head_trainable=first.get("head_trainable"),
        nbytes=runs[0].get("bytes"),
        cost=cost if cost and "status" not in cost else {},
        steps=steps,
        runs=ran,
        right=[run["right"] for run in runs if "right" in run],
        adapter=adapter if runs[0]["status"] == "finished" else None,
        reason=failed,
    )


def runs_of(sweep: Sweep, entry: Entry, done: Results) -> list[Run]:
    """Returns every run of a row: those that chose its rate, then those scored on
    the test split.
    """
    tuned = tune(sweep, entry, done)
    specs = [sweep.spec(entry, lr, seed, "tune") for lr in tuned.tried for seed in TUNING_SEEDS]
    specs += finals(sweep, entry, tuned.lr) if tuned.lr is not None else []
    return [
        _run_of_result(spec, done[sweep.key(spec)]) for spec in specs if sweep.key(spec) in done
    ]


def _run_of_result(spec: RunSpec, result: Mapping[str, Any]) -> Run:
    return Run(
        purpose=spec.purpose,
        lr=spec.lr,
        seed=spec.seed,
        steps=spec.steps,
        validation=result.get("validation", {}).get("score"),
        test=result.get("test", {}).get("score"),
        seconds=result.get("seconds"),
        reason=result.get("reason"),
        attempts=result.get("attempts", 1),
        earlier=tuple(result.get("earlier", ())),
        scores=result.get("test", {}).get("scores", {}),
    )


def notes_of(sweep: Sweep, done: Results) -> list[str]:
    """Returns notes on best rates at the edge of a grid, on failed rates, and on runs that needed a
    second attempt.
    """
    notes = []
    for entry in sweep.entries:
        tuned = tune(sweep, entry, done)
        if tuned.edge and tuned.lr is not None:
            notes.append(
                f"{entry.label}: the best learning rate, {format_rate(tuned.lr)}, is at the edge of those "
                "tried "
                f"({', '.join(format_rate(lr) for lr in tuned.tried)}); a better one may be beyond it."
            )
        lost = [format_rate(lr) for lr in tuned.tried if lr not in tuned.scores]
        if lost and tuned.lr is not None:
            reason = next(run.reason for run in runs_of(sweep, entry, done) if run.reason)
            notes.append(
                f"{entry.label}: training failed with the learning rate{'s' * (len(lost) > 1)} "
                f"{', '.join(lost)}: {' '.join(reason.split()).rstrip('.')}."
            )
        later = [run for run in runs_of(sweep, entry, done) if run.reason is None and run.earlier]
        if later:
            notes.append(
                f"{entry.label}: {len(later)} run{'s' * (len(later) > 1)} finished at a later "
                "attempt; the first "
                f"failed: {' '.join(later[0].earlier[0].split()).rstrip('.')}."
            )
    reasons = dict.fromkeys(
        f"{name} is missing: {' '.join(why.split()).rstrip('.')}."
        for run in done.values()
        for name, why in run.get("test", {}).get("reasons", {}).items()
    )
    return [*notes, *reasons]
