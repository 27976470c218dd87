"""A training step: forward and backward, the optimiser's step apart and together.

The optimiser steps in every round, inside or outside what is compared: what a method derives from
its numbers (DoRA's norm) is stale after it, as in training, and is computed again within the time
of the next forward.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..contenders import Contender, check
from ..factory import make
from ..internals import norm_counter
from ..setup import Setup, batch, build, layers
from ..timing import Rounds, Work, interleave, now


def measure(
    setup: Setup,
    contenders: tuple[str, ...],
    rounds: Rounds,
    others: Mapping[str, Work] | None = None,
) -> dict[str, Any]:
    """Metrics: forward, backward, step (both), optimiser, whole (all three), and norms if DoRA's
    are counted. `others` are more works for the same rounds.
    """
    base = build(setup)
    made = [make(name, base, setup) for name in contenders]
    data = [batch(setup, seed) for seed in range(1, setup.accumulate + 1)]
    check(made, base, data[0], setup)
    samples: dict[str, Any] = interleave(
        {**{c.name: work(c, data, setup.device) for c in made}, **(others or {})}, rounds
    )
    sites = sum(1 for _ in layers(base, setup))
    for c in made:
        count = _norms(c, data)
        if count is not None:
            samples[c.name]["norms"] = [count / sites]
    return {"samples": samples}


def work(c: Contender, data: list[dict[str, Tensor]], device: str = "cpu") -> Work:
    """Returns one whole step; its times end when `device` has done its work."""

    def run() -> Mapping[str, float]:
        forward = backward = 0.0
        if c.optimiser is not None:
            c.optimiser.zero_grad(set_to_none=True)
        for micro in data:
            started = now(device)
            loss = c.loss(micro) / len(data)
            middle = now(device)
            loss.backward()  # type: ignore[no-untyped-call]
            forward, backward = forward + middle - started, backward + now(device) - middle
            del loss
        started = now(device)
        if c.optimiser is not None:
            c.optimiser.step()
        if c.after_step is not None:
            c.after_step()
        optimiser = now(device) - started
        step = forward + backward
        return {
            "forward": forward,
            "backward": backward,
            "step": step,
            "optimiser": optimiser,
            "whole": step + optimiser,
        }

    return run


def _norms(c: Contender, data: list[dict[str, Tensor]]) -> int | None:
    """Norms that Weft computes in one whole step; None where it has no counter, or the contender is
    not Weft's.
    """
    counter = norm_counter() if c.name.startswith("weft.D") else None
    if counter is None:
        return None
    before = counter()
    work(c, data)()
    return counter() - before
