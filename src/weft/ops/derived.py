"""Values that depend on other tensors, computed when these change and not when they are read.

DoRA's norm depends on W, A and B, which stand still from one optimiser step to the next, however
many micro-batches and recomputations there are between. A value is handed out again only if nothing
shows that a source has moved:

* every source is the same tensor at the same place in memory, and torch's version of it is the same
  (in-place edits, `load_state_dict`, `copy_`);
* no optimiser of torch has stepped since, where a source trains (one that writes through `.data`
  keeps the version);
* on the CPU the small sources, those that train, are also equal to copies of them, number by
  number, and the large one, W, on a sample of its numbers: so an edit through `.data`, a pointer or
  a preserved version (FSDP) is seen too.

Inside `torch.compile` and CUDA graphs nothing is kept: there the value is part of the graph.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

counts: Counter[str] = (
    Counter()
)  # how often a value of each name was computed in this process, for whoever wants to know

_SAMPLE = 64  # numbers of a large source that are compared
_SMALL = 1 << 20  # numbers up to which a source is compared whole, if it trains
_steps: list[int] = []  # optimiser steps since this module began to count


def _stepped(*_: Any) -> None:
    _steps[0] += 1


def _steps_so_far() -> int:
    """Counts from its first call on, so that torch is left alone until a value is kept."""
    if not _steps:
        _steps.append(0)
        register_optimizer_step_post_hook(_stepped)
    return _steps[0]


class Derived:
    """The values of one adapted layer by name. A copy or a pickle starts empty."""

    def __init__(self) -> None:
        self._held: dict[str, tuple[Any, list[Tensor], Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_held": {}}

    def get(
        self,
        name: str,
        trained: Sequence[Tensor],
        frozen: Sequence[Tensor],
        compute: Callable[[], Any],
    ) -> Any:
        """`compute()`, or what it gave when `trained` and `frozen` were what they are now. Never
        part of a graph.
        """
        sources = (*trained, *frozen)
        if not _can_be_kept(sources):
            return _computed(name, compute)
        key = (
            _steps_so_far() if trained else 0,
            *((t.data_ptr(), t._version, t.shape, t.dtype, t.device) for t in sources),
        )
        held = self._held.get(name)
        looked = (
            [*(_whole(t) for t in trained), *(_sample(t) for t in frozen)]
            if sources[0].device.type == "cpu"
            else []
        )
        if held is not None and held[0] == key and all(map(torch.equal, held[1], looked)):
            return held[2]
        value = _computed(name, compute)
        self._held[name] = (key, [t.clone() for t in looked], value)
        return value

    def clear(self) -> None:
        """Forget everything."""
        self._held.clear()


def _computed(name: str, compute: Callable[[], Any]) -> Any:
    counts[name] += 1
    # A tensor made in inference mode could never meet autograd again.
    with torch.inference_mode(False), torch.no_grad():
        return compute()


def _can_be_kept(sources: Sequence[Tensor]) -> bool:
    if torch.compiler.is_compiling():
        return False
    if any(
        t.is_inference() or t.is_meta or type(t) not in (Tensor, torch.nn.Parameter)
        for t in sources
    ):
        return False
    return sources[0].device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def _whole(t: Tensor) -> Tensor:
    t = t.detach()
    return t if t.numel() <= _SMALL else _sample(t)


def _sample(t: Tensor) -> Tensor:
    """Numbers from all over a tensor: a diagonal walk, so that every row range and column range is
    met.
    """
    t = t.detach()
    if t.numel() <= _SAMPLE:
        return t
    if t.ndim != 2:
        return t.reshape(-1)[:: t.numel() // _SAMPLE]
    rows, columns = t.shape
    stride = t.stride(0) * max(1, rows // _SAMPLE) + t.stride(1) * max(1, columns // _SAMPLE)
    n = min(rows // max(1, rows // _SAMPLE), columns // max(1, columns // _SAMPLE), _SAMPLE)
    return t.as_strided((n,), (stride,))
