"""Trains, scores and measures one model on one task, and returns values that JSON can store."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ... import __version__, methods
from ...errors import AuditError, WeftError
from ...methods import LoRA
from ...model.adapter import Adapter
from ...model.attach import attach
from ...model.detach import detach
from ...tasks.models import find_model
from ...training.losses import DivergedError
from ..devices import SMALL, choose_device
from ..plan.budgets import lowest_rank, nearest_rank
from ..plan.sweep import RunSpec
from ..tasks.base import OpenTask
from ..tasks.loop import Recipe, on_device, renew, train
from ..tasks.open_task import open_task
from . import measure


@dataclass(frozen=True, kw_only=True)
class RunnerConfig:
    """The settings with which a worker opens a runner, as plain values for a pipe."""

    task: str
    model: str
    test: str | None = None
    limits: dict[str, int | None]  # largest number of examples per split
    device: str = "auto"
    threads: int = 1  # for models that are not small


class TrialRunner:
    """Keeps the model between runs. Every run attaches, trains, scores and detaches."""

    def __init__(self, task: OpenTask, device: torch.device) -> None:
        self.task, self.head, self.device = task, task.head, device
        self.model = task.model.to(device)

    def describe(self) -> dict[str, Any]:
        """Returns the facts for the plan: fingerprints, head, sizes, notes."""
        facts = self.task.facts()
        return {
            "context": {
                "device": self.device.type,
                "weft": __version__,
                "torch": torch.__version__,
                **facts.fingerprints,
            },
            "head": list(self.head),
            "narrowest": self._narrowest(facts.frozen),
            "frozen": list(facts.frozen),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "device": torch.cuda.get_device_name()
            if self.device.type == "cuda"
            else platform.machine() + " CPU",
            **{name: getattr(facts, name) for name in ("kind", "metric", "chosen_by", "lowest")},
            "sizes": dict(facts.sizes),
            "classes": list(facts.classes),
            "notes": list(facts.notes),
            "guess": None if facts.guess is None else asdict(facts.guess),
        }

    def _narrowest(self, frozen: Sequence[str]) -> int:
        """Returns the input size of the narrowest layer that "all-linear" adapts, without the
        frozen ones.
        """
        adapter = attach(self.model, LoRA(r=1, modules_to_save=self.head, exclude=list(frozen)))
        try:
            return int(min(site.shape[1] for site in adapter.layers.values()))
        finally:
            detach(self.model)

    def run(self, spec: RunSpec, save_to: Path | None = None) -> dict[str, Any]:
        """Trains and scores. If the audit fails or the loss diverges, the result has the reason."""
        started = time.perf_counter()
        # A head that is not new is trained like any other tensor.
        head_lr = spec.head_lr if self.head else spec.lr
        recipe = Recipe(
            steps=spec.steps,
            batch=spec.batch,
            lr=spec.lr,
            head_lr=head_lr,
            seed=spec.seed,
            warm_up=spec.warm_up,
            weight_decay=spec.weight_decay,
            lora_plus=spec.lora_plus,
        )
        result: dict[str, Any] = {"schema": 1, "spec": asdict(spec)}
        adapter = self.attach_new(spec.config, spec.seed)
        try:
            own = self._own_parameters(adapter)
            result |= {"trainable": own, "head_trainable": adapter.num_parameters - own}
            result["losses"] = train(self.model, adapter, self.task.train, recipe)
            result["validation"] = asdict(self.task.validate())
            if spec.purpose == "final":
                result |= _test_result(self.task)
            if save_to is not None:
                result["bytes"] = _saved_bytes(adapter, save_to)
            result["status"] = "finished"
        except (AuditError, DivergedError) as error:
            result |= {
                "status": "failed",
                "reason": f"{type(error).__name__}: {' '.join(str(error).split())}",
            }
        finally:
            detach(self.model)
        return result | {"seconds": time.perf_counter() - started}

    def _own_parameters(self, adapter: Adapter) -> int:
        """Returns the number of trained parameters without those of a new head, which every method
        trains.
        """
        return adapter.num_parameters - (adapter.num_head_parameters if self.head else 0)

    def attach_new(self, config: Mapping[str, Any], seed: int) -> Adapter:
        """Initializes a new head from the seed if the task has one, then attaches the method."""
        renew(self.model, self.head, seed)
        return attach(self.model, methods.from_json(dict(config)))

    def ranks(
        self, configs: Mapping[str, Mapping[str, Any]], target: int | None, limit: int
    ) -> dict[str, Any]:
        """Chooses by label the rank whose number of trained parameters is nearest to `target`.

        If `target` is None, the number of the first configuration is used, which keeps its rank.
        Returns {"target", "rows"}. Raises WeftError if that first configuration cannot be attached.
        """
        rows: dict[str, dict[str, Any]] = {}
        for label, config in configs.items():
            try:
                rows[label] = self._ranked(config, target, limit)
            except WeftError as error:
                if target is None:
                    raise
                rows[label] = {"reason": " ".join(str(error).split())}
            if target is None:
                target = int(rows[label]["trainable"])
        return {"target": target, "rows": rows}

    def _ranked(self, config: Mapping[str, Any], target: int | None, limit: int) -> dict[str, Any]:
        rank = config.get("r")
        if rank is not None and target is not None:
            low = lowest_rank(methods.from_json(dict(config)))
            rank = nearest_rank(
                cache(lambda r: self._count({**config, "r": r})), target, low, max(low, limit)
            )
            config = {**config, "r": rank}
        return {"r": rank, "trainable": self._count(config)}

    def _count(self, config: Mapping[str, Any]) -> int:
        """Returns the number of trained parameters without the head."""
        adapter = self.attach_new(config, 0)
        try:
            return self._own_parameters(adapter)
        finally:
            detach(self.model)

    def measure(self, config: Mapping[str, Any], batch: int) -> dict[str, Any]:
        """Returns step time relative to the frozen base, and peak memory, on one training batch."""
        rows = torch.arange(min(batch, len(self.task.train)))
        inputs, labels = on_device(self.task.train, rows, self.device)
        peak = measure.peak_bytes(self.model, lambda: self.attach_new(config, 0), inputs, labels)
        times = measure.step_times(self.model, lambda: self.attach_new(config, 0), inputs, labels)
        return {"peak_bytes": peak, **times}


def _test_result(task: OpenTask) -> dict[str, Any]:
    """Returns the score on the test split.

    Also which examples are right, if the score counts them, and all metrics, if the task has
    several.
    """
    result = task.test()
    several = (
        {"scores": dict(result.scores), "reasons": dict(result.reasons)} if result.scores else {}
    )
    return {
        "test": {**asdict(result.score), **several},
        **({"right": result.right} if result.right is not None else {}),
    }


def _saved_bytes(adapter: Adapter, path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    adapter.save(path)
    return (path / "adapter_model.safetensors").stat().st_size


def open_runner(config: RunnerConfig) -> TrialRunner:
    """Loads task and model, finds the head, and chooses device and threads. Raises WeftError if one
    of them cannot be used.
    """
    torch.set_num_threads(1)
    task = open_task(config.task, config.test, find_model(config.model), config.limits)
    parameters = sum(p.numel() for p in task.model.parameters())
    if parameters >= SMALL:
        torch.set_num_threads(config.threads)
    return TrialRunner(task, choose_device(config.device, parameters))
