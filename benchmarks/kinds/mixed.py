"""One batch whose rows have adapters of their own: against one adapter for all rows, and with more
of them resident.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor, nn

import weft

from ..contenders import AGREE, IdleError, attach_awake, split
from ..setup import Setup, build, twin
from ..timing import Rounds, clocked, interleave

ROWS = 16
RESIDENT = (2, 4, 16, 64)
METHODS = ("LoRA", "DoRA", "VeRA:256", "DVoRA:256")


def measure(setup: Setup, contenders: tuple[str, ...], rounds: Rounds) -> dict[str, Any]:
    """Metric: seconds of a forward of 16 rows, for the contenders (of METHODS: one adapter for all
    rows) and for "mixed:k", where k adapters of the four methods are resident and the rows have as
    many different ones as they can.

    "flat" has the metric deviation: the largest difference of one "mixed:k" from the mean of all,
    relative to it.
    """
    base = build(setup)
    length = max(1, setup.tokens // ROWS)
    ids = torch.randint(5, 500, (ROWS, length), generator=torch.Generator().manual_seed(3))
    works = {}
    with torch.no_grad():
        for name in contenders:
            model = crowded(base, setup, (name,), 1)
            works[name] = clocked(_forward(model, "a0", ids))
        for k in RESIDENT:
            model = crowded(base, setup, METHODS, k)
            rows = [f"a{i % k}" for i in range(ROWS)]
            check_rows(model, rows, ids, setup)
            works[f"mixed:{k}"] = clocked(_forward(model, rows, ids))
        samples: dict[str, Any] = interleave(works, rounds)
    medians = [median(samples[f"mixed:{k}"]["seconds"]) for k in RESIDENT]
    samples["flat"] = {"deviation": [max(abs(m / mean(medians) - 1) for m in medians)]}
    return {"samples": samples}


def crowded(base: nn.Module, setup: Setup, methods: tuple[str, ...], number: int) -> nn.Module:
    """A model with `number` adapters a0, a1, ... of the methods in turn."""
    model = twin(base)
    for i in range(number):
        _, _, own = split(methods[i % len(methods)], setup)
        attach_awake(methods[i % len(methods)].partition(":")[0], model, own, name=f"a{i}")
    return model.eval()


def _forward(model: Any, which: Any, ids: Tensor) -> Callable[[], None]:
    weft.use(model, which)

    def run() -> None:
        model(ids)

    return run


def check_rows(model: Any, rows: list[str], ids: Tensor, setup: Setup) -> None:
    """Raises IdleError where a row is not what its own adapter alone gives it."""
    with weft.use(model, rows):
        mixed = model(ids).logits
    with weft.use(model, None):
        base = model(ids).logits
    for i in range(min(len(METHODS), len(set(rows)))):
        with weft.use(model, rows[i]):
            alone = model(ids[i : i + 1]).logits
        gap = float((mixed[i] - alone[0]).abs().max() / alone.abs().max())
        if gap > AGREE[setup.torch_dtype] or torch.equal(mixed[i], base[i]):
            raise IdleError(
                f"row {i} with adapter {rows[i]!r} differs from that adapter alone by {gap:.1e}."
            )
