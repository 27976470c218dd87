"""One layer with packed weights (NF4) in training: time per step beside peft, how often the weight is
unpacked, and what of it is alive after a forward.

`python -m benchmarks.packed [FILE]` prints a table and writes FILE (JSON). All contenders take turns in
each round. A step is forward, backward to the adapter and to the input, and the optimiser.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

import weft
from weft.ops.cache import counts

from .machine import machine, versions

WIDTH, TOKENS, RANK = 1536, 128, 8
ROUNDS, STEPS = 15, 2
METHODS = ("LoRA", "VeRA", "DoRA", "DVoRA")


def packed() -> nn.Module:
    """A model of one NF4 layer, the same each time."""
    layer_class = import_module("bitsandbytes.nn").Linear4bit
    torch.manual_seed(0)
    layer = layer_class(WIDTH, WIDTH, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    layer.load_state_dict(nn.Linear(WIDTH, WIDTH, bias=False).state_dict())
    return nn.Sequential(layer.requires_grad_(False)).to("cpu").train()


def contender(name: str) -> tuple[nn.Module, list[nn.Parameter]]:
    """A model and its trained tensors: "base", "weft.METHOD", "peft.LoRA" or "peft.DoRA"."""
    model = packed()
    kind, _, method = name.partition(".")
    if kind == "weft":
        adapter = weft.attach(model, weft.methods.METHODS[method](r=RANK, targets=["0"]))
        return model, list(adapter.parameters())
    if kind == "peft":
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=RANK, lora_alpha=RANK, target_modules=["0"], use_dora=method == "DoRA"
        )
        model = get_peft_model(model, config).train()
    return model, [p for p in model.parameters() if p.requires_grad]


class Step:
    """One training step of a contender."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.model, trained = contender(name)
        self.optimiser = torch.optim.SGD(trained, lr=1e-3) if trained else None
        self.x = torch.randn(TOKENS, WIDTH, requires_grad=True)

    def __call__(self) -> None:
        self.model(self.x).square().sum().backward()
        if self.optimiser is not None:
            self.optimiser.step()
            self.optimiser.zero_grad()
        self.x.grad = None

    def unpacked(self) -> int:
        """How often Weft unpacks the weight in one step, beyond what the layer's own products do."""
        self()
        before = counts["unpacked"]
        self()
        return counts["unpacked"] - before

    def dense_copies(self) -> int:
        """How many tensors of at least W's size are new after a forward whose graph is held."""
        self()
        before = _large()
        out = self.model(self.x)
        found = _large() - before
        del out
        return len(found)


def _large() -> set[int]:
    gc.collect()
    tensors = (o for o in gc.get_objects() if isinstance(o, torch.Tensor))
    return {
        t.untyped_storage().data_ptr()
        for t in tensors
        if t.is_floating_point() and t.numel() >= WIDTH * WIDTH
    }


def measured(steps: dict[str, Callable[[], None]]) -> dict[str, list[float]]:
    """Milliseconds per step of every contender, per round."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    for run in steps.values():
        run()
    for _ in range(ROUNDS):
        for name, run in steps.items():
            started = time.perf_counter()
            for _ in range(STEPS):
                run()
            found[name].append(1e3 * (time.perf_counter() - started) / STEPS)
    return found


def main() -> None:
    torch.set_num_threads(1)
    names = ("base", *(f"weft.{method}" for method in METHODS), "peft.LoRA", "peft.DoRA")
    steps = {name: Step(name) for name in names}
    facts: dict[str, dict[str, Any]] = {
        name: {
            "unpacked": step.unpacked() if not name.startswith("peft") else None,
            "dense_copies": step.dense_copies(),
        }
        for name, step in steps.items()
    }
    samples = measured(dict(steps))
    rows: list[dict[str, Any]] = [
        {"name": n, "ms": round(median(samples[n]), 2), "samples": samples[n], **facts[n]}
        for n in names
    ]
    record = {
        "command": "python -m benchmarks.packed",
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "versions": {**versions(), "bitsandbytes": version("bitsandbytes")},
        "shape": {"width": WIDTH, "tokens": TOKENS, "rank": RANK, "format": "NF4", "threads": 1},
        "rows": rows,
    }
    print(f"{'':<12}{'ms/step':>9}{'unpacked':>10}{'dense copies':>14}")
    for row in rows:
        unpacked = "" if row["unpacked"] is None else row["unpacked"]
        print(f"{row['name']:<12}{row['ms']:>9.1f}{unpacked:>10}{row['dense_copies']:>14}")
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
