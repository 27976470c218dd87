"""Values computed from other tensors, kept until one of these changes.

DoRA's norm depends on W, A and B, which do not change from one optimiser step to the next, however
many micro-batches and recomputations there are between. A kept value is returned only if no source
shows a change:

* its address and torch's version of it are the same (in-place edits, `load_state_dict`,
  `copy_`, `p.data = ...`);
* no optimiser of torch has stepped since, for sources that train;
* on the CPU its numbers are equal to a copy: all of them if it trains or is small, for W at least one
  per row. So an edit through `.data`, a pointer or a preserved version (FSDP) is seen unless it
  misses all of these numbers; row_scale.py catches those. On other devices model/norm_watch.py
  compares sums, once per forward of the model.

Inside CUDA graphs nothing is kept: there the value is part of the graph. `torch.compile` sees the
general definition, which keeps nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

counts: Counter[str] = Counter()  # computations per name in this process

_SMALL = 1 << 8  # numbers up to which a frozen source is compared whole
_TRAINED = 1 << 20  # the same for one that trains
_SAMPLED = 1 << 13  # numbers of W up to which it is compared whether `sampled` or not
_FEW = 1 << 13  # numbers that are compared in one call
compared = {"cpu"}  # kinds of devices whose numbers are compared in every call
kept_on: set[str] = set()  # the other kinds of devices on which something is kept
_steps: list[int] = []  # optimiser steps since this module began to count


def _count_step(*_: Any) -> None:
    _steps[0] += 1


def steps_so_far() -> int:
    """Counts from its first call on, so that torch has no hook of ours before a value is kept."""
    if not _steps:
        _steps.append(0)
        register_optimizer_step_post_hook(_count_step)
    return _steps[0]


class _Entry:
    """One kept value and the state of its sources when it was computed."""

    __slots__ = ("apart", "copies", "joint", "joint_copy", "seen", "steps", "value", "views")

    def __init__(
        self,
        value: Any,
        trained: Sequence[Tensor],
        frozen: Sequence[Tensor],
        last: _Entry | None,
        sampled: bool,
    ) -> None:
        sources = (*trained, *frozen)
        self.value = value
        self.steps = steps_so_far() if trained else -1
        self.seen = [(t.data_ptr(), t._version) for t in sources]
        self.views: list[Tensor] = []
        if last is not None and [s[0] for s in last.seen] == [s[0] for s in self.seen]:
            self.views = last.views  # of the same memory
        elif sources[0].device.type in compared:
            found = [v for t in trained for v in _watched(t.detach(), _TRAINED)]
            for i, t in enumerate(frozen):
                limit = _SMALL if i else _SAMPLED
                if t.numel() <= limit or (sampled and not i):
                    found += _watched(t.detach(), _SMALL)
            self.views = found
        else:
            kept_on.add(sources[0].device.type)
        # Of few numbers a joint copy is compared: there a call costs more than the numbers.
        few = sum(v.numel() for v in self.views) <= _FEW
        self.joint = [v for v in self.views if few and v.is_contiguous() and v.ndim == 1]
        self.apart = [v for v in self.views if all(v is not w for w in self.joint)]
        self.copies = [v.clone() for v in self.apart]
        self.joint_copy = torch.cat(self.joint) if self.joint else None

    def holds(self, sources: Sequence[Tensor]) -> bool:
        """Whether no source has changed since."""
        if self.steps >= 0 and self.steps != _steps[0]:
            return False
        try:
            for t, (address, version) in zip(sources, self.seen, strict=True):
                if t._version != version or t.data_ptr() != address:
                    return False
        except (RuntimeError, ValueError):  # an inference tensor has no version; or another number
            return False
        # The views share the memory whose addresses were just compared.
        if self.joint_copy is not None and not torch.equal(torch.cat(self.joint), self.joint_copy):
            return False
        for view, copy in zip(self.apart, self.copies, strict=True):
            if not torch.equal(view, copy):
                return False
        return True


class Cache:
    """The kept values of one adapted layer, by name. A copy or a pickle starts empty."""

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}

    def __reduce__(self) -> Any:
        return Cache, ()

    def __len__(self) -> int:
        return len(self._entries)

    def fresh(self, name: str, sources: Sequence[Tensor]) -> Any:
        """Returns the kept value if no source has changed, else None. The sources are those of
        `get`.
        """
        entry = self._entries.get(name)
        if entry is None or not _may_keep(sources[0]) or not entry.holds(sources):
            return None
        return entry.value

    def get(
        self,
        name: str,
        trained: Sequence[Tensor],
        frozen: Sequence[Tensor],
        compute: Callable[[], Any],
        sampled: bool = True,
    ) -> Any:
        """Returns `compute()`, or what it gave if no source has changed since. Never with a graph.

        `sampled`: numbers of the first frozen source, W, are compared even if it is large, one per
        row.
        """
        sources = (*trained, *frozen)
        entry = self._entries.get(name)
        if entry is not None and _may_keep(sources[0]) and entry.holds(sources):
            return entry.value
        value = _computed(name, compute)
        if _may_keep(sources[0]) and all(map(_is_plain, sources)):
            self._entries[name] = _Entry(value, trained, frozen, entry, sampled)
        return value

    def clear(self) -> None:
        """Drops everything."""
        self._entries.clear()


def kept(compute: Callable[[], Tensor]) -> Tensor:
    """Returns `compute()`, a tensor [...] without a graph that may meet autograd later."""
    found: Tensor = _without_graph(compute)
    return found


def _computed(name: str, compute: Callable[[], Any]) -> Any:
    counts[name] += 1
    return _without_graph(compute)


def _without_graph(compute: Callable[[], Any]) -> Any:
    if torch.is_inference_mode_enabled():  # its tensors could never meet autograd again
        with torch.inference_mode(False), torch.no_grad():
            return compute()
    with torch.no_grad():
        return compute()


def _may_keep(first: Tensor) -> bool:
    return not (first.is_cuda and torch.cuda.is_current_stream_capturing())


def _is_plain(t: Tensor) -> bool:
    return type(t) in (Tensor, torch.nn.Parameter) and not t.is_inference() and not t.is_meta


def _watched(t: Tensor, whole: int) -> list[Tensor]:
    """Views of the numbers of t that are compared: all of them, or a walk through all rows."""
    if t.numel() <= whole:
        turned = t if t.is_contiguous() else t.mT if t.ndim == 2 else t
        return [turned.view(-1) if turned.is_contiguous() else t]
    if t.ndim != 2:
        return [t.reshape(-1)[:: t.numel() // whole]]
    rows, columns = t.shape
    (row, column), n = t.stride(), min(rows, columns)
    diagonal = t.as_strided((n,), (row * (rows // n) + column * (columns // n),))
    return [diagonal] if rows <= columns else [diagonal, t[:, 0]]
