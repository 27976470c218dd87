"""Measures the step time and the memory of rows, one after the other on an otherwise idle pool."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..plan.entries import Entry
from ..plan.sweep import Sweep, finals, tune
from .directory import MEASURING
from .scheduler import Job, JobSource, Scheduler
from .study import Study

OnMeasured = Callable[[int, str], None]  # receives the number of measured rows and a message


def measure_rows(
    sweep: Sweep,
    entries: Sequence[Entry],
    study: Study,
    scheduler: Scheduler,
    on_measured: OnMeasured,
    device: str,
) -> dict[str, dict[str, Any]]:
    """Returns the results of `TrialRunner.measure` by label.

    Results that the study already has for this kind of machine are reused.
    """
    costs = study.measures()
    keys = {entry.label: _cost_key(sweep, entry, device) for entry in entries}
    configs = {keys[entry.label]: sweep.spec(entry, 0.0, 0, "final").config for entry in entries}
    labels = {key: label for label, key in keys.items()}

    def ready() -> list[Job]:
        return [
            Job(key, {"do": "measure", "config": configs[key], "batch": sweep.batch})
            for key in labels
            if key not in costs
        ]

    def finished(job: Job, result: dict[str, Any]) -> None:
        if not result.get("lost"):
            study.add_measure(job.key, result)
        costs[job.key] = result
        outcome = (
            f"failed: {result['reason']}"
            if result.get("lost")
            else f"step x {result['step_ratio']:.2f}"
        )
        measured = sum(key in costs for key in keys.values())
        on_measured(measured, f"{labels[job.key]} measured: {outcome}")

    if ready():
        # Locked: another process would slow this measurement down, and repeat it.
        with study.lock(MEASURING):
            costs |= study.measures()
            scheduler.run(JobSource(ready, finished))
    return {label: costs[key] for label, key in keys.items()}


def has_scores(sweep: Sweep, entry: Entry, done: Mapping[str, Any]) -> bool:
    """Returns True if every scored run of the row has finished."""
    lr = tune(sweep, entry, done).lr
    return lr is not None and all(
        done[sweep.key(s)]["status"] == "finished" for s in finals(sweep, entry, lr)
    )


def _cost_key(sweep: Sweep, entry: Entry, device: str) -> str:
    """Like a run's key, but it depends on the machine and not on the evaluation data."""
    context = {
        key: value for key, value in sweep.context.items() if key not in ("validation", "test")
    }
    data = [sweep.spec(entry, 0.0, 0, "final").config, sweep.batch, context, device]
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]
