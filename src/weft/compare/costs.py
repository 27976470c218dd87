"""Step time and memory of rows, one after the other and with nothing beside them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .dispatch import Crew, Jobs, Order
from .entries import Entry
from .plan import Sweep, finals, tune
from .store import MEASURING
from .study import Study

Told = Callable[[int, str], None]  # rows that are measured, and what has just been


def measure(
    sweep: Sweep, entries: Sequence[Entry], study: Study, crew: Crew, told: Told, device: str
) -> dict[str, dict[str, Any]]:
    """What `Bench.measure` returns, by label; what was measured before on such a machine comes from
    the study.
    """
    costs = study.measures()
    keys = {entry.label: _key(sweep, entry, device) for entry in entries}
    configs = {keys[entry.label]: sweep.spec(entry, 0.0, 0, "final").config for entry in entries}
    labels = {key: label for label, key in keys.items()}

    def orders() -> list[Order]:
        return [
            Order(key, {"do": "measure", "config": configs[key], "batch": sweep.batch})
            for key in labels
            if key not in costs
        ]

    def finished(order: Order, result: dict[str, Any]) -> None:
        if not result.get("lost"):
            study.add_measure(order.key, result)
        costs[order.key] = result
        what = (
            f"failed: {result['reason']}"
            if result.get("lost")
            else f"step x {result['step_ratio']:.2f}"
        )
        told(sum(key in costs for key in keys.values()), f"{labels[order.key]} measured: {what}")

    if orders():
        with study.lock(
            MEASURING
        ):  # another process beside it would take time from it, and would measure the same
            costs |= study.measures()
            crew.work(Jobs(orders, finished))
    return {label: costs[key] for label, key in keys.items()}


def has_scores(sweep: Sweep, entry: Entry, done: Mapping[str, Any]) -> bool:
    lr = tune(sweep, entry, done).lr
    return lr is not None and all(
        done[sweep.key(s)]["status"] == "finished" for s in finals(sweep, entry, lr)
    )


def _key(sweep: Sweep, entry: Entry, device: str) -> str:
    """Like a run's key; the machine matters, the data that is scored does not."""
    context = {
        key: value for key, value in sweep.context.items() if key not in ("validation", "test")
    }
    data = [sweep.spec(entry, 0.0, 0, "final").config, sweep.batch, context, device]
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]
