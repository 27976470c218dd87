"""The training runs of a sweep as jobs of a scheduler, shared with other processes through the
study.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..plan.entries import Entry, format_rate
from ..plan.sweep import Results, RunSpec, Sweep, count_runs, finals, missing, tune
from .directory import ADAPTERS, adapter_name
from .progress import Progress
from .scheduler import Job, JobSource, Scheduler
from .study import State, Study


@dataclass
class SweepJobs:
    """Trains the missing runs of a sweep.

    `measured` is the number of rows that were measured before; each counts as one run in the
    progress display.
    """

    sweep: Sweep
    study: Study
    out: Path
    display: Progress
    measured: int = 0
    _state: State = field(default_factory=State)
    _own: set[str] = field(default_factory=set)  # keys of runs that finished in this process

    def train(self, scheduler: Scheduler) -> dict[str, dict[str, Any]]:
        """Trains until no run is missing. Returns every run's result by key."""
        self._state = self.study.refresh()
        self.display.start(*self._count())
        # One attempt per scheduler: the study counts the attempts of all processes.
        scheduler.run(
            JobSource(self._ready, self._finished, self._claim, self._running_elsewhere, attempts=1)
        )
        return self._state.done

    def _ready(self) -> list[Job]:
        before, self._state = self._state, self.study.refresh()
        for key in self._state.done.keys() - before.done.keys():
            self._show(key, self._state.done[key])
        for key in self._state.retrying.keys() - before.retrying.keys():
            result = self._state.retrying[key]
            self.display.message(
                f"{run_name(result['spec'])} failed and is tried once more: {result['reason']}"
            )
        return [
            Job(
                self.sweep.key(spec),
                {"do": "run", "spec": asdict(spec), "save_to": self._save_to(spec)},
            )
            for spec in missing(self.sweep, self._state.done)
            if self.sweep.key(spec) not in self._state.busy
        ]

    def _claim(self, job: Job) -> bool:
        return self.study.claim(RunSpec(**job.message["spec"]), job.key)

    def _finished(self, job: Job, result: dict[str, Any]) -> None:
        if job.message["save_to"]:
            folder = Path(job.message["save_to"])
            result = {
                **result,
                "adapter": {
                    "name": folder.name,
                    "host": platform.node(),
                    "folder": str(folder.resolve()),
                },
            }
        self._own.add(job.key)
        if not self.study.finish(job.key, result):
            self.display.message(
                f"{run_name(job.message['spec'])}: the study received no heartbeat from this "
                "process for so long that it gave the run to another; the result from here is "
                "discarded."
            )

    def _running_elsewhere(self) -> bool:
        return any(
            self.sweep.key(spec) in self._state.busy
            for spec in missing(self.sweep, self._state.done)
        )

    def _show(self, key: str, result: Mapping[str, Any]) -> None:
        where = "" if key in self._own else " (elsewhere)"
        self.display.step(*self._count(), f"{run_outcome(self.sweep, result)}{where}")

    def _count(self) -> tuple[int, int]:
        finished, total = count_runs(self.sweep, self._state.done)
        return finished + self.measured, total + len(self.sweep.entries)

    def _save_to(self, spec: RunSpec) -> str | None:
        if spec.purpose != "final" or spec.seed != 0:
            return None
        return str(self.out / ADAPTERS / adapter_name(spec.label, self.sweep.key(spec)))


def run_name(spec: Mapping[str, Any]) -> str:
    """Returns the label, the learning rate and the seed of a run."""
    return f"{spec['label']} lr {format_rate(spec['lr'])} seed {spec['seed']}"


def run_outcome(sweep: Sweep, result: Mapping[str, Any]) -> str:
    """Returns the name of a run and its score, or the reason why it failed."""
    spec = result["spec"]
    if result["status"] != "finished":
        return f"{run_name(spec)} failed: {result['reason']}"
    split, scale = (
        ("test", sweep.scored_by) if spec["purpose"] == "final" else ("validation", sweep.chosen_by)
    )
    return f"{run_name(spec)} {split} {scale.with_metric(result[split]['score'])}"


def adapter_of(
    sweep: Sweep, entry: Entry, done: Results, out: Path
) -> tuple[str | None, str | None]:
    """Returns the folder of the first seed's adapter, or None and a note if it is elsewhere."""
    lr = tune(sweep, entry, done).lr
    saved = done[sweep.key(finals(sweep, entry, lr)[0])].get("adapter") if lr is not None else None
    if saved is None:
        return None, None
    folder = out / ADAPTERS / saved["name"]
    if folder.is_dir():
        return str(folder), None
    return None, (
        f"{entry.label}: the adapter of its first seed is not here; it was written to "
        f"{saved['folder']} on {saved['host']}."
    )
