"""What an adapter adds to the time of one layer: a stack of equal linear layers, with the time per
layer of the same stack without adapters subtracted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from ..contenders import LEAST_EFFECT, Contender, IdleError, split, tolerance
from ..factory import make
from ..floor import floor
from ..setup import Setup, build, layers, twin
from ..timing import Rounds, Work, interleave, now

LR = 1e-5  # small, and large enough that every step moves the numbers
SAMPLE, MOST_CALLS = 0.004, 20  # a sample is so many calls in a row that the base takes 4 ms


def measure(setup: Setup, contenders: tuple[str, ...], rounds: Rounds) -> dict[str, Any]:
    """Metrics, in seconds per layer: forward (eval mode, no gradients), train (forward, backward,
    and SGD's step), forward_extra and train_extra (beyond "bare" in the same round).

    "bare", "weft.METHOD:r", "peft.METHOD:r", "floor.METHOD:r". Raises ValueError if "bare" is not
    among them.
    """
    if "bare" not in contenders:
        raise ValueError('extra time is counted beyond the base model; name "bare".')
    base = build(setup)
    x, g = inputs(base, setup)
    made = [contender(name, base, setup) for name in contenders]
    check(made, x, g, setup)
    calls = _calls(base, x, setup.device)
    samples: dict[str, Any] = interleave(
        {c.name: _work(c, x, g, calls, len(list(layers(base, setup))), setup.device) for c in made},
        rounds,
    )
    for found in samples.values():
        for metric in ("forward", "train"):
            pairs = zip(found[metric], samples["bare"][metric], strict=True)
            found[f"{metric}_extra"] = [own - bare for own, bare in pairs]
    return {"samples": samples}


def inputs(base: nn.Module, setup: Setup) -> tuple[Tensor, Tensor]:
    """An input and a gradient of the output, both [1, tokens, width]."""
    width = next(base.parameters()).shape[0]
    generator = torch.Generator().manual_seed(1)
    x, g = torch.randn(2, 1, setup.tokens, width, generator=generator).to(
        setup.device, setup.torch_dtype
    )
    return x.requires_grad_(True), g


def contender(name: str, base: nn.Module, setup: Setup) -> Contender:
    """Returns a contender whose optimiser is SGD; "bare" has none."""
    side, method, own = split(name, setup)
    if side == "bare":
        made = Contender(name, twin(base), {}, "base", 0)
    elif side == "floor":
        made = floor(name, method, base, own)
    else:
        made = make(name, base, setup)
    if made.trained:
        made.optimiser = torch.optim.SGD(made.trained.values(), lr=LR)
    return made


def check(made: list[Contender], x: Tensor, g: Tensor, setup: Setup) -> None:
    """Raises IdleError: a tensor without a gradient, a wrong number of trained numbers, an adapter
    that changes nothing, or an output or input gradient unlike that of another contender of the
    same equation.
    """
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for c in made:
        numbers = sum(p.numel() for p in c.trained.values())
        if numbers != c.expected:
            raise IdleError(f"{c.name} trains {numbers:,} numbers; it should be {c.expected:,}.")
        y = c.model.train()(x)
        (dx,) = torch.autograd.grad(y, x, g, retain_graph=bool(c.trained))
        y.backward(g) if c.trained else None
        for name, p in c.trained.items():
            if p.grad is None or not bool(p.grad.any()):
                raise IdleError(f"{c.name}: {name!r} got no gradient.")
            p.grad = None
        x.grad = None
        own = (y.detach(), dx)
        for a, b in zip(own, found.setdefault(c.equation, own), strict=True):
            if _distance(a, b) > tolerance(setup):
                raise IdleError(f"{c.name} computes something else than its equation's first.")
        if c.equation != "base" and _distance(own[0], found["base"][0]) < LEAST_EFFECT:
            raise IdleError(f"{c.name} leaves the base's output as it is.")


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).abs().max() / b.float().abs().max())


@torch.no_grad()
def _calls(base: nn.Module, x: Tensor, device: str) -> int:
    base(x)
    started = now(device)
    base(x)
    return max(1, min(MOST_CALLS, math.ceil(SAMPLE / (now(device) - started))))


def _work(c: Contender, x: Tensor, g: Tensor, calls: int, depth: int, device: str) -> Work:
    def forward() -> None:
        c.model(x)

    def train() -> None:
        if c.optimiser is not None:
            c.optimiser.zero_grad(set_to_none=True)
        x.grad = None
        c.model(x).backward(g)
        if c.optimiser is not None:
            c.optimiser.step()

    def run() -> Mapping[str, float]:
        c.model.eval()
        with torch.no_grad():
            forward_time = _timed(forward, calls, device)
        c.model.train()
        return {"forward": forward_time / depth, "train": _timed(train, calls, device) / depth}

    return run


def _timed(call: Callable[[], None], calls: int, device: str) -> float:
    """Seconds per call. The first call, which sees another mode than the one before, is not
    counted.
    """
    call()
    now(device)
    started = perf_counter()
    for _ in range(calls):
        call()
    return (now(device) - started) / calls
