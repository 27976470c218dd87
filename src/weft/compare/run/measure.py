"""Measures a training step: its time relative to the frozen-base limit, and its peak memory.

The frozen-base limit is forward and backward of the same model with all weights frozen and
gradients flowing back to the output of the input embedding. A method that trains something in every
layer needs at least this. A method's step is forward, backward, optimiser step and clearing the
gradients. (Head needs no gradient below the head, so it can be below 1.)
"""

from __future__ import annotations

import copy
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from ...errors import WeftError
from ...model.adapter import Adapter
from ...model.detach import detach
from ..tasks.loop import forward_loss

ROUNDS, LEAST_ROUNDS, WARM_UP, SECONDS = 41, 5, 3, 12.0
# A method with a schedule gets this number of steps, so that all timed steps are in its busy phase.
SCHEDULED_STEPS = 1000


def step_times(
    model: nn.Module, attach: Callable[[], Adapter], inputs: Mapping[str, Tensor], labels: Tensor
) -> dict[str, Any]:
    """Times both kinds of step in turns, so that a busy machine slows both alike.

    `inputs` are tensors [batch, ...], `labels` [batch, ...]. Returns step_ratio (median of the
    pairwise ratios), step_ratio_spread (10th and 90th percentile), step_seconds and limit_seconds
    (medians), and rounds. Raises WeftError if the model's input embedding cannot be found.
    """
    frozen = copy.deepcopy(model).requires_grad_(False).train()
    hooks = flow_from_embedding(frozen)
    adapter = attach()
    adapter.plan_steps(SCHEDULED_STEPS)
    model.train()
    try:
        method = training_step(model, adapter, inputs, labels)

        def limit() -> None:
            forward_loss(frozen, inputs, labels).backward()  # type: ignore[no-untyped-call]

        pairs = _interleaved(limit, method, labels.device)
    finally:
        model.eval()
        detach(model)
        hooks.close()
    ratios = sorted(b / a for a, b in pairs)
    tenth = len(ratios) // 10
    return {
        "step_ratio": median(ratios),
        "step_ratio_spread": [ratios[tenth], ratios[-1 - tenth]],
        "step_seconds": median(b for _, b in pairs),
        "limit_seconds": median(a for a, _ in pairs),
        "rounds": len(pairs),
    }


def training_step(
    model: nn.Module, adapter: Adapter, inputs: Mapping[str, Tensor], labels: Tensor
) -> Callable[[], None]:
    """Returns a function that makes one training step on a fixed batch, with a negligible learning
    rate.

    `inputs` are tensors [batch, ...], `labels` [batch, ...].
    """
    optimiser = torch.optim.AdamW(adapter.parameters(), lr=1e-8, weight_decay=0.0)

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        forward_loss(model, inputs, labels).backward()  # type: ignore[no-untyped-call]
        optimiser.step()

    return step


def _interleaved(
    a: Callable[[], None], b: Callable[[], None], device: torch.device
) -> list[tuple[float, float]]:
    for _ in range(WARM_UP):
        clock(a, device)
        clock(b, device)
    pairs: list[tuple[float, float]] = []
    started = time.perf_counter()
    while len(pairs) < ROUNDS and (
        len(pairs) < LEAST_ROUNDS or time.perf_counter() - started < SECONDS
    ):
        pairs.append((clock(a, device), clock(b, device)))
    return pairs


def clock(work: Callable[[], None], device: torch.device) -> float:
    """Returns the seconds of one call, and synchronizes the device before and after it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def flow_from_embedding(model: nn.Module) -> ExitStack:
    """Makes gradients flow back to the output of the input embedding, in all modules that have its
    table (BART's encoder and decoder have one each).

    Returns what removes the hooks when it is closed. Raises WeftError if the model does not provide
    its input embedding.
    """
    find = getattr(model, "get_input_embeddings", None)
    embedding = find() if find is not None else None
    if not isinstance(embedding, nn.Module):
        raise WeftError(
            f"{type(model).__name__} has no get_input_embeddings, which finds its input embedding."
        )

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        output.requires_grad_(True)

    table, hooks = embedding._parameters.get("weight"), ExitStack()
    for module in model.modules():
        tied = table is not None and module._parameters.get("weight") is table
        if module is embedding or (tied and isinstance(module, nn.Embedding)):
            hooks.callback(module.register_forward_hook(hook).remove)
    return hooks


def peak_bytes(
    model: nn.Module, attach: Callable[[], Adapter], inputs: Mapping[str, Tensor], labels: Tensor
) -> int:
    """Returns the peak memory of a training step, after a first step created the optimiser's state.

    `inputs` are tensors [batch, ...], `labels` [batch, ...]. On the CPU these are counted: the
    storages of the base's parameters and buffers, of the adapter, its gradients, the optimiser's
    state, the batch, and every tensor that an operation of the step returns, while it is referenced
    (saved activations, gradients, temporaries between operations). Not counted: scratch memory
    inside a kernel, the allocator's rounding, Python and torch themselves. On CUDA it is
    torch.cuda.max_memory_allocated.
    """
    # Before attach: a module that a trained copy replaces stays in memory.
    tensors = [*model.parameters(), *model.buffers()]
    adapter = attach()
    adapter.plan_steps(SCHEDULED_STEPS)
    model.train()
    try:
        optimiser = torch.optim.AdamW(adapter.parameters(), lr=1e-8, weight_decay=0.0)

        def step() -> None:
            forward_loss(model, inputs, labels).backward()  # type: ignore[no-untyped-call]
            optimiser.step()

        step()
        optimiser.zero_grad(set_to_none=True)
        if labels.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            step()
            return int(torch.cuda.max_memory_allocated())
        state = [
            t for per in optimiser.state.values() for t in per.values() if isinstance(t, Tensor)
        ]
        tensors += [
            *model.parameters(),
            *model.buffers(),
            *adapter.parameters(),
            *state,
            *inputs.values(),
            labels,
        ]
        with LiveBytes(tensors) as live:
            step()
        return int(live.peak)
    finally:
        model.eval()
        detach(model)


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of distinct live storages after every operation; `peak` is the maximum."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._seen: dict[int, Any] = {}
        for tensor in tensors:
            self._add(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, Tensor):
                self._add(value)
        return out

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        size = storage.nbytes()
        self._seen[key] = weakref.finalize(storage, self._drop, key, size)
        self.live += size
        self.peak = max(self.peak, self.live)

    def _drop(self, key: int, size: int) -> None:
        self.live -= size
        del self._seen[key]
