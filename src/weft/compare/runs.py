"""The runs of a sweep as jobs for a crew: those that nobody has, until all are done here or
elsewhere.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .dispatch import Crew, Jobs, Order
from .entries import Entry, rate
from .plan import Results, RunSpec, Sweep, finals, missing, progress, tune
from .progress import Progress
from .store import ADAPTERS, adapter_name
from .study import State, Study


@dataclass
class Runs:
    """`measured` rows have been measured before, which counts as one run each for the progress."""

    sweep: Sweep
    study: Study
    out: Path
    shown: Progress
    measured: int = 0
    _state: State = field(default_factory=State)
    _mine: set[str] = field(default_factory=set)  # runs that finished here

    def train(self, crew: Crew) -> dict[str, dict[str, Any]]:
        """Do what is missing. Returns every run's result by key."""
        self._state = self.study.refresh()
        self.shown.start(*self._progress())
        crew.work(
            Jobs(self._orders, self._finished, self._take, self._elsewhere, attempts=1)
        )  # the study counts them
        return self._state.done

    def _orders(self) -> list[Order]:
        before, self._state = self._state, self.study.refresh()
        for key in self._state.done.keys() - before.done.keys():
            self._tell(key, self._state.done[key])
        for key in self._state.again.keys() - before.again.keys():
            result = self._state.again[key]
            self.shown.say(
                f"{name(result['spec'])} failed and is tried once more: {result['reason']}"
            )
        return [
            Order(
                self.sweep.key(spec),
                {"do": "run", "spec": asdict(spec), "save_to": self._save_to(spec)},
            )
            for spec in missing(self.sweep, self._state.done)
            if self.sweep.key(spec) not in self._state.busy
        ]

    def _take(self, order: Order) -> bool:
        return self.study.claim(RunSpec(**order.message["spec"]), order.key)

    def _finished(self, order: Order, result: dict[str, Any]) -> None:
        if order.message["save_to"]:
            folder = Path(order.message["save_to"])
            result = {
                **result,
                "adapter": {
                    "name": folder.name,
                    "host": platform.node(),
                    "folder": str(folder.resolve()),
                },
            }
        self._mine.add(order.key)
        if not self.study.finish(order.key, result):
            self.shown.say(
                f"{name(order.message['spec'])}: no sign of life from here reached the study for "
                "so long that "
                "the run was given to others; what it found here is dropped."
            )

    def _elsewhere(self) -> bool:
        return any(
            self.sweep.key(spec) in self._state.busy
            for spec in missing(self.sweep, self._state.done)
        )

    def _tell(self, key: str, result: Mapping[str, Any]) -> None:
        where = "" if key in self._mine else " (elsewhere)"
        self.shown.step(*self._progress(), f"{outcome(self.sweep, result)}{where}")

    def _progress(self) -> tuple[int, int]:
        finished, total = progress(self.sweep, self._state.done)
        return finished + self.measured, total + len(self.sweep.entries)

    def _save_to(self, spec: RunSpec) -> str | None:
        if spec.purpose != "final" or spec.seed != 0:
            return None
        return str(self.out / ADAPTERS / adapter_name(spec.label, self.sweep.key(spec)))


def name(spec: Mapping[str, Any]) -> str:
    return f"{spec['label']} lr {rate(spec['lr'])} seed {spec['seed']}"


def outcome(sweep: Sweep, result: Mapping[str, Any]) -> str:
    """One run in half a line."""
    spec = result["spec"]
    if result["status"] != "finished":
        return f"{name(spec)} failed: {result['reason']}"
    split, scale = (
        ("test", sweep.scored_by) if spec["purpose"] == "final" else ("validation", sweep.chosen_by)
    )
    return f"{name(spec)} {split} {scale.told(result[split]['score'])}"


def adapter_of(
    sweep: Sweep, entry: Entry, done: Results, out: Path
) -> tuple[str | None, str | None]:
    """The folder of the first seed's adapter, or in words where else it is."""
    lr = tune(sweep, entry, done).lr
    saved = done[sweep.key(finals(sweep, entry, lr)[0])].get("adapter") if lr is not None else None
    if saved is None:
        return None, None
    folder = out / ADAPTERS / saved["name"]
    if folder.is_dir():
        return str(folder), None
    return None, (
        f"{entry.label}: the adapter of its first seed is not here; it was written to "
        f"{saved['folder']} on "
        f"{saved['host']}."
    )
