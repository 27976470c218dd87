"""Memory of one training step, counted exactly, and (kind "peak") the peak of a process of its
own.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch

from .. import memory
from ..contenders import check, split
from ..factory import make
from ..setup import Setup, batch, build, layers
from ..timing import Rounds

# tokens that tell whether an adapter is in force; that outputs agree is for the timed cases to
# check
GATE = 64


def measure(setup: Setup, contenders: tuple[str, ...], rounds: Rounds) -> dict[str, Any]:
    """Metrics: saved, held and peak of memory.of_step; beyond, which is saved less the base model's
    own (the limit's); activations, which is beyond divided by the low-rank activations x Aᵀ of all
    adapted layers.

    The limit has to be among the contenders. Raises ValueError where it is not.
    """
    if "limit" not in contenders:
        raise ValueError(
            "the base model's own bytes are those of the limit; name it among the contenders."
        )
    base, data = build(setup), batch(setup)
    few = batch(replace(setup, tokens=min(setup.tokens, GATE)))
    adapted = [name for name, _, _ in layers(base, setup)]
    found, details = {}, {}
    for name in contenders:
        contender = make(name, base, setup)
        check([contender], base, few, setup)
        loss = partial(contender.loss, data)
        found[name] = memory.of_step(contender.model, data, loss, adapted)
        details[name] = found[name].pop("kept")
    samples: dict[str, dict[str, list[float]]] = {}
    for name, numbers in found.items():
        beyond = numbers["saved"] - found["limit"]["saved"]
        small = len(adapted) * setup.tokens * split(name, setup)[2].r * setup.torch_dtype.itemsize
        values = {**numbers, "beyond": beyond, "activations": beyond / small}
        samples[name] = {metric: [float(value)] for metric, value in values.items()}
    return {"samples": samples, "kept": details}


def measure_peak(setup: Setup, contenders: tuple[str, ...], rounds: Rounds) -> dict[str, Any]:
    """Metrics: process_peak, and before_steps, the peak before the first step."""
    found = {
        name: memory.of_process(name, asdict(setup), torch.get_num_threads()) for name in contenders
    }
    return {
        "samples": {
            name: {k: [float(v)] for k, v in values.items()} for name, values in found.items()
        }
    }
