"""A training step of a 7B-shaped model on a GPU, with all of its 32 layers or with as many as fit.

With fewer layers the step of the whole model is extrapolated: the time of the model without any
layer, plus 32 / n of what n layers add to it. Both are timed in the same rounds.
"""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import torch

from ..contenders import Contender
from ..factory import make
from ..setup import Setup, batch, build
from ..timing import Rounds
from . import step

LAYERS = 32
HEAD = "no layers"  # the contender without layers: embedding, head and loss


def measure(setup: Setup, contenders: tuple[str, ...], rounds: Rounds) -> dict[str, Any]:
    """Metrics of kinds/step.py, and step_32: forward and backward of all 32 layers, in seconds.

    setup.model is "NAME/n". If the GPU has no room for n layers, n / 2 are measured, and the notes
    of the case name both.
    """
    name, _, count = setup.model.partition("/")
    layers, notes = int(count), []
    while True:
        own = replace(setup, model=f"{name}/{layers}")
        try:
            samples = _measured(own, contenders, rounds)
            break
        except torch.OutOfMemoryError:
            if layers <= 2:
                raise
            notes.append(f"out of memory with {layers} layers")
        layers //= 2
        clear(setup.device)
    clear(setup.device)
    head = samples[HEAD]["step"]
    for found in samples.values():
        found["step_32"] = [
            h + (s - h) * LAYERS / layers for h, s in zip(head, found["step"], strict=True)
        ]
    how = "measured" if layers == LAYERS else "step_32 is extrapolated"
    return {"samples": samples, "notes": [*notes, f"{layers} of {LAYERS} layers, {how}"]}


def _measured(setup: Setup, contenders: tuple[str, ...], rounds: Rounds) -> dict[str, Any]:
    name = setup.model.partition("/")[0]
    empty: Contender = make("limit", build(replace(setup, model=f"{name}/0")), setup)
    others = {HEAD: step.work(empty, [batch(setup)], setup.device)}
    samples: dict[str, Any] = step.measure(setup, contenders, rounds, others)["samples"]
    return samples


def clear(device: str) -> None:
    """Gives memory that nothing uses any more back to the GPU."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
