"""One model and one task, opened: runs a training run or a measurement and returns plain JSON values."""

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
from ..model.structure import head_modules
from ..tasks import SPLITS, find_task
from ..tasks.models import Prepared, find_model, prepare
from ..training.loop import DivergedError, Recipe, Score, answers, evaluate, renew, score_of, train
from . import measure
from .budgets import lowest_rank, nearest_rank
from .plan import RunSpec

SMALL = 20_000_000  # parameters; below it two single-threaded runs side by side beat one run on two threads
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

    def __init__(self, prepared: Prepared, head: tuple[str, ...], device: torch.device) -> None:
        self.prepared, self.head, self.device = prepared, head, device
        self.model = prepared.model.to(device)

    def describe(self) -> dict[str, Any]:
        """Facts that the planning needs: fingerprints, head, sizes, notes."""
        splits = self.prepared.splits
        return {
            "context": {"model": self.prepared.fingerprint, "device": self.device.type, "weft": __version__,
                        "torch": torch.__version__, **{name: splits[name].fingerprint() for name in SPLITS}},
            "head": list(self.head),
            "narrowest": self._narrowest(),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "sizes": {name: len(splits[name].labels) for name in SPLITS},
            "classes": list(self.prepared.classes),
            "metric": self.prepared.metric,
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else platform.machine() + " CPU",
            "notes": self.prepared.notes,
        }

    def _narrowest(self) -> int:
        """Inputs of the narrowest layer that "all-linear" adapts."""
        adapter = attach(self.model, LoRA(r=1, modules_to_save=self.head))
        try:
            return int(min(site.shape[1] for site in adapter.sites.values()))
        finally:
            detach(self.model)

    def run(self, spec: RunSpec, save_to: Path | None = None) -> dict[str, Any]:
        """Train and score. A run whose audit fails or whose loss diverges is a result too, with its reason."""
        started = time.perf_counter()
        recipe = Recipe(steps=spec.steps, batch=spec.batch, lr=spec.lr, head_lr=spec.head_lr, seed=spec.seed)
        result: dict[str, Any] = {"schema": 1, "spec": asdict(spec)}
        adapter = self.attach_new(spec.config, spec.seed)
        try:
            result |= {"trainable": adapter.num_parameters - adapter.num_head_parameters,
                       "head_trainable": adapter.num_head_parameters}
            result["losses"] = train(self.model, adapter, self.prepared.splits["train"], recipe)
            result["validation"] = asdict(self._score("validation"))
            if spec.purpose == "final":
                result |= self._tested()
            if save_to is not None:
                result["bytes"] = _saved_bytes(adapter, save_to)
            result["status"] = "finished"
        except (AuditError, DivergedError) as error:
            result |= {"status": "failed", "reason": f"{type(error).__name__}: {' '.join(str(error).split())}"}
        finally:
            detach(self.model)
        return result | {"seconds": time.perf_counter() - started}

    def _score(self, split: str) -> Score:
        return evaluate(self.model, self.prepared.splits[split], metric=self.prepared.metric)

    def _tested(self) -> dict[str, Any]:
        """The test split's score, and where it is the share of right answers, which ones are: "1" or "0" each."""
        split = self.prepared.splits["test"]
        logits = answers(self.model, split)
        result: dict[str, Any] = {"test": asdict(score_of(logits, split, self.prepared.metric))}
        if self.prepared.metric == "accuracy":
            result["right"] = "".join("01"[int(right)] for right in logits.argmax(dim=1) == split.labels)
        return result

    def attach_new(self, config: Mapping[str, Any], seed: int) -> Adapter:
        """A new head from the seed, then the method on top."""
        renew(self.model, self.head, seed)
        return attach(self.model, methods.from_json(dict(config)))

    def ranks(self, configs: Mapping[str, Mapping[str, Any]], target: int | None, most: int) -> dict[str, Any]:
        """By label the rank whose trained numbers come nearest to `target`, and their number: {"target", "rows"}.

        target=None means the number of the first, which keeps its rank, and must be one that can be attached.
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
            rank = nearest_rank(cache(lambda r: self._count({**config, "r": r})), target, low, max(low, most))
            config = {**config, "r": rank}
        return {"r": rank, "trainable": self._count(config)}

    def _count(self, config: Mapping[str, Any]) -> int:
        """Trained numbers without the head's."""
        adapter = self.attach_new(config, 0)
        try:
            return int(adapter.num_parameters - adapter.num_head_parameters)
        finally:
            detach(self.model)

    def measure(self, config: Mapping[str, Any], batch: int) -> dict[str, Any]:
        """Step time against the frozen base, and peak memory, on one training batch."""
        train_split = self.prepared.splits["train"]
        rows = torch.arange(min(batch, len(train_split.labels)))
        inputs = {key: value.to(self.device) for key, value in train_split.batch(rows).items()}
        labels = train_split.labels[rows].to(self.device)
        peak = measure.peak_bytes(self.model, lambda: self.attach_new(config, 0), inputs, labels)
        times = measure.step_times(self.model, lambda: self.attach_new(config, 0), inputs, labels)
        return {"peak_bytes": peak, **times}


def _saved_bytes(adapter: Adapter, path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    adapter.save(path)
    return (path / "adapter_model.safetensors").stat().st_size


def open_bench(opening: Opening) -> Bench:
    """Load task and model, find the head, choose device and threads. Raises WeftError."""
    torch.set_num_threads(1)
    prepared = prepare(find_task(opening.task, opening.test).load(), find_model(opening.model), opening.most)
    numbers = sum(p.numel() for p in prepared.model.parameters())
    if numbers >= SMALL:
        torch.set_num_threads(opening.threads)
    return Bench(prepared, fresh_modules(prepared), choose_device(opening.device, numbers))


def fresh_modules(prepared: Prepared) -> tuple[str, ...]:
    """The modules that every row trains from new values: the head, and what the checkpoint has no tensors for."""
    head = list(head_modules(prepared.model))
    if not head:
        raise WeftError(f"{type(prepared.model).__name__} has no output head that could be trained for "
                        f"{len(prepared.classes) or 'no'} classes.")
    loose = [name for name in prepared.missing if not any(name.startswith(module + ".") for module in head)]
    return tuple(dict.fromkeys([*head, *(name.rpartition(".")[0] for name in loose)]))


def choose_device(asked: str, parameters: int) -> torch.device:
    """"auto" is CUDA where there is one and the model is worth it. Raises WeftError for a device that is not there."""
    there = torch.cuda.is_available()
    if asked == "cuda" and not there:
        raise WeftError("--device cuda: torch sees no CUDA device here. See `weft doctor`.")
    return torch.device("cuda" if asked == "cuda" or (asked == "auto" and there and parameters >= TINY) else "cpu")
