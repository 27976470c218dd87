"""One model and one task, opened: runs a training run or a measurement and returns plain JSON
values.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from .. import __version__, methods
from ..errors import AuditError, WeftError
from ..methods import LoRA
from ..model.adapter import Adapter
from ..model.attach import attach, detach
from ..tasks.models import find_model
from ..training.losses import DivergedError
from . import measure
from .budgets import lowest_rank, nearest_rank
from .plan import RunSpec
from .tasks.base import OpenTask
from .tasks.loop import Recipe, on_device, renew, train
from .tasks.open_task import open_task

# parameters; below it two single-threaded runs side by side beat one run on two threads
SMALL = 20_000_000
TINY = 1_000_000  # below it a GPU only waits for the next kernel


@dataclass(frozen=True, kw_only=True)
class Opening:
    """What a worker needs to open a bench; plain values, since it crosses a pipe."""

    task: str
    model: str
    test: str | None = None
    most: dict[str, int | None]
    device: str = "auto"
    threads: int = 1  # for models that are not small


class Bench:
    """Holds the model between runs; every run attaches, trains, scores and detaches."""

    def __init__(self, task: OpenTask, device: torch.device) -> None:
        self.task, self.head, self.device = task, task.head, device
        self.model = task.model.to(device)

    def describe(self) -> dict[str, Any]:
        """Facts that the planning needs: fingerprints, head, sizes, notes."""
        facts = self.task.facts()
        return {
            "context": {
                "device": self.device.type,
                "weft": __version__,
                "torch": torch.__version__,
                **facts.fingerprints,
            },
            "head": list(self.head),
            "narrowest": self._narrowest(),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "device": torch.cuda.get_device_name()
            if self.device.type == "cuda"
            else platform.machine() + " CPU",
            **{name: getattr(facts, name) for name in ("kind", "metric", "chosen_by", "lowest")},
            "sizes": dict(facts.sizes),
            "classes": list(facts.classes),
            "notes": list(facts.notes),
        }

    def _narrowest(self) -> int:
        """Inputs of the narrowest layer that "all-linear" adapts."""
        adapter = attach(self.model, LoRA(r=1, modules_to_save=self.head))
        try:
            return int(min(site.shape[1] for site in adapter.layers.values()))
        finally:
            detach(self.model)

    def run(self, spec: RunSpec, save_to: Path | None = None) -> dict[str, Any]:
        """Train and score. A run whose audit fails or whose loss diverges is a result too, with its
        reason.
        """
        started = time.perf_counter()
        head_lr = (
            spec.head_lr if self.head else spec.lr
        )  # a head that is not new is a tensor like the others
        recipe = Recipe(
            steps=spec.steps,
            batch=spec.batch,
            lr=spec.lr,
            head_lr=head_lr,
            seed=spec.seed,
            warm_up=spec.warm_up,
            weight_decay=spec.weight_decay,
        )
        result: dict[str, Any] = {"schema": 1, "spec": asdict(spec)}
        adapter = self.attach_new(spec.config, spec.seed)
        try:
            own = self._own(adapter)
            result |= {"trainable": own, "head_trainable": adapter.num_parameters - own}
            result["losses"] = train(self.model, adapter, self.task.train, recipe)
            result["validation"] = asdict(self.task.validate())
            if spec.purpose == "final":
                result |= _tested(self.task)
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

    def _own(self, adapter: Adapter) -> int:
        """Trained numbers of the method itself: without those of a new head, which every method
        trains.
        """
        return adapter.num_parameters - (adapter.num_head_parameters if self.head else 0)

    def attach_new(self, config: Mapping[str, Any], seed: int) -> Adapter:
        """A new head from the seed, where the task has one, then the method on top."""
        renew(self.model, self.head, seed)
        return attach(self.model, methods.from_json(dict(config)))

    def ranks(
        self, configs: Mapping[str, Mapping[str, Any]], target: int | None, most: int
    ) -> dict[str, Any]:
        """By label the rank whose trained numbers come nearest to `target`, and their number:
        {"target", "rows"}.

        target=None means the number of the first, which keeps its rank, and must be one that can be
        attached.
        """
        rows: dict[str, dict[str, Any]] = {}
        for label, config in configs.items():
            try:
                rows[label] = self._ranked(config, target, most)
            except WeftError as error:
                if target is None:
                    raise
                rows[label] = {"reason": " ".join(str(error).split())}
            if target is None:
                target = int(rows[label]["trainable"])
        return {"target": target, "rows": rows}

    def _ranked(self, config: Mapping[str, Any], target: int | None, most: int) -> dict[str, Any]:
        rank = config.get("r")
        if rank is not None and target is not None:
            low = lowest_rank(methods.from_json(dict(config)))
            rank = nearest_rank(
                cache(lambda r: self._count({**config, "r": r})), target, low, max(low, most)
            )
            config = {**config, "r": rank}
        return {"r": rank, "trainable": self._count(config)}

    def _count(self, config: Mapping[str, Any]) -> int:
        """Trained numbers without the head's."""
        adapter = self.attach_new(config, 0)
        try:
            return self._own(adapter)
        finally:
            detach(self.model)

    def measure(self, config: Mapping[str, Any], batch: int) -> dict[str, Any]:
        """Step time against the frozen base, and peak memory, on one training batch."""
        rows = torch.arange(min(batch, len(self.task.train)))
        inputs, labels = on_device(self.task.train, rows, self.device)
        peak = measure.peak_bytes(self.model, lambda: self.attach_new(config, 0), inputs, labels)
        times = measure.step_times(self.model, lambda: self.attach_new(config, 0), inputs, labels)
        return {"peak_bytes": peak, **times}


def _tested(task: OpenTask) -> dict[str, Any]:
    """The test split's score; which examples are right, where that makes the score; all metrics,
    where there are several.
    """
    found = task.test()
    several = {"scores": dict(found.scores), "reasons": dict(found.reasons)} if found.scores else {}
    return {
        "test": {**asdict(found.score), **several},
        **({"right": found.right} if found.right is not None else {}),
    }


def _saved_bytes(adapter: Adapter, path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    adapter.save(path)
    return (path / "adapter_model.safetensors").stat().st_size


def open_bench(opening: Opening) -> Bench:
    """Load task and model, find the head, choose device and threads. Raises WeftError."""
    torch.set_num_threads(1)
    task = open_task(opening.task, opening.test, find_model(opening.model), opening.most)
    numbers = sum(p.numel() for p in task.model.parameters())
    if numbers >= SMALL:
        torch.set_num_threads(opening.threads)
    return Bench(task, choose_device(opening.device, numbers))


def choose_device(asked: str, parameters: int) -> torch.device:
    """ "auto" is CUDA where there is one and the model is worth it. Raises WeftError for a device
    that is not there.
    """
    there = torch.cuda.is_available()
    if asked == "cuda" and not there:
        raise WeftError("--device cuda: torch sees no CUDA device here. See `weft doctor`.")
    return torch.device(
        "cuda" if asked == "cuda" or (asked == "auto" and there and parameters >= TINY) else "cpu"
    )
