"""What a training step costs: its time against the frozen-base limit, and its peak memory.

The frozen-base limit is forward and backward of the same model with every weight frozen and the
gradient flowing back to the output of the input embedding: what any method must at least do that
trains something in every layer. A method's step is forward, backward, optimiser step and clearing
the gradients. (Head, which needs no gradient below the head, can be below 1.)
"""

from __future__ import annotations

import copy
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from ..errors import WeftError
from ..model.adapter import Adapter
from ..model.attach import detach
from .tasks.loop import forward_loss

ROUNDS, FEWEST, WARM, SECONDS = 41, 5, 3, 12.0
# steps that a method with a schedule is told, so that all that are clocked lie in its busy phase
SCHEDULE = 1000


def step_times(
    model: nn.Module, attach: Callable[[], Adapter], inputs: Mapping[str, Tensor], labels: Tensor
) -> dict[str, Any]:
    """Times of both kinds of step, taken in turns so that a busy machine slows both alike.

    Returns step_ratio (median of the pairwise ratios), step_ratio_spread (10th and 90th
    percentile), step_seconds and limit_seconds (medians), rounds.
    """
    frozen = copy.deepcopy(model).requires_grad_(False).train()
    handle = flow_from_embedding(frozen)
    adapter = attach()
    adapter.plan_steps(SCHEDULE)
    model.train()
    try:
        method = training_step(model, adapter, inputs, labels)

        def limit() -> None:
            forward_loss(frozen, inputs, labels).backward()  # type: ignore[no-untyped-call]

        pairs = _interleaved(limit, method, labels.device)
    finally:
        model.eval()
        detach(model)
        handle.remove()
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
    """One whole step on a fixed batch, at a rate that changes next to nothing."""
    optimiser = torch.optim.AdamW(adapter.parameters(), lr=1e-8, weight_decay=0.0)

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        forward_loss(model, inputs, labels).backward()  # type: ignore[no-untyped-call]
        optimiser.step()

    return step


def _interleaved(
    a: Callable[[], None], b: Callable[[], None], device: torch.device
) -> list[tuple[float, float]]:
    for _ in range(WARM):
        clock(a, device)
        clock(b, device)
    pairs: list[tuple[float, float]] = []
    started = time.perf_counter()
    while len(pairs) < ROUNDS and (len(pairs) < FEWEST or time.perf_counter() - started < SECONDS):
        pairs.append((clock(a, device), clock(b, device)))
    return pairs


def clock(work: Callable[[], None], device: torch.device) -> float:
    """Seconds of one call; waits for the device on both sides."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def flow_from_embedding(model: nn.Module) -> Any:
    """Make the input embedding's output ask for a gradient, as if something below it were
    trained.
    """
    find = getattr(model, "get_input_embeddings", None)
    embedding = find() if find is not None else None
    if not isinstance(embedding, nn.Module):
        raise WeftError(
            f"{type(model).__name__} does not say where its input embedding is "
            "(get_input_embeddings)."
        )

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        output.requires_grad_(True)

    return embedding.register_forward_hook(hook)


def peak_bytes(
    model: nn.Module, attach: Callable[[], Adapter], inputs: Mapping[str, Tensor], labels: Tensor
) -> int:
    """Most bytes held at one time during a training step, after a first step has made the
    optimiser's state.

    Counted on the CPU: the storages of the base's parameters and buffers, of the adapter, its
    gradients, the optimiser's state, the batch, and every tensor that an operation of the step
    returns, for as long as something holds it (saved activations, gradients, temporaries between
    operations). Not counted: scratch memory inside a single kernel, the allocator's rounding,
    Python and torch themselves. On CUDA: torch.cuda.max_memory_allocated.
    """
    held = [
        *model.parameters(),
        *model.buffers(),
    ]  # before attach: what a trained copy replaces stays in memory
    adapter = attach()
    adapter.plan_steps(SCHEDULE)
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
        held += [
            *model.parameters(),
            *model.buffers(),
            *adapter.parameters(),
            *state,
            *inputs.values(),
            labels,
        ]
        with LiveBytes(held) as live:
            step()
        return int(live.peak)
    finally:
        model.eval()
        detach(model)


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sum of the distinct storages alive, followed operation by operation; `peak` is its
    maximum.
    """

    def __init__(self, held: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._seen: dict[int, Any] = {}
        for tensor in held:
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
