"""Bytes: what autograd keeps for backward, what is alive, and what a whole process takes.

Three counts, since each can be fooled alone: the saved-tensor hooks see what is saved by name and
not what a custom function keeps in an attribute; the storages alive after the forward hold that
too; the process holds all, and Python.
"""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

ROOT = Path(__file__).resolve().parent.parent


class SavedBytes:
    """The storages that autograd keeps for one forward: each once, parameters, buffers and the
    batch apart.

    `bytes` is their sum; `kept` says what they are, by dtype and shape of the tensor that was saved
    first and by whether that was within an adapted layer.
    """

    def __init__(
        self, model: nn.Module, batch: Iterable[Tensor] = (), adapted: Iterable[str] = ()
    ) -> None:
        self.model, self.adapted = model, tuple(adapted)
        self._apart = {_key(t) for t in (*model.parameters(), *model.buffers(), *batch)}
        self._storages: dict[
            int, Any
        ] = {}  # holding them keeps their addresses from being used again
        self._kinds: Counter[tuple[str, tuple[int, ...], bool]] = Counter()
        self._inside = 0

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what is saved within."""
        hooks = list(self._watch())
        try:
            with saved_tensors_hooks(self._pack, lambda t: t):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _watch(self) -> Iterator[Any]:
        for name, module in self.model.named_modules():
            if name.removeprefix("base_model.model.") in self.adapted:
                yield module.register_forward_pre_hook(lambda *_: self._move(1))
                yield module.register_forward_hook(lambda *_: self._move(-1))

    def _move(self, by: int) -> None:
        self._inside += by

    def _pack(self, t: Tensor) -> Tensor:
        key = _key(t)
        if key not in self._apart and key not in self._storages:
            self._storages[key] = storage = t.untyped_storage()
            kind = str(t.dtype).removeprefix("torch."), tuple(t.shape), self._inside > 0
            self._kinds[kind] += storage.nbytes()
        return t

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self._storages.values())

    @property
    def kept(self) -> list[dict[str, Any]]:
        """Largest first."""
        return [
            {"dtype": dtype, "shape": list(shape), "adapted": inside, "bytes": size}
            for (dtype, shape, inside), size in self._kinds.most_common()
        ]


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the distinct storages that operations within have returned and something still
    holds; `peak` of them.
    """

    def __init__(self, apart: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._apart = {_key(t) for t in apart}
        self._alive: dict[int, Any] = {}
        self.bytes = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, Tensor):
                self._add(value)
        return out

    def _add(self, t: Tensor) -> None:
        key = _key(t)
        if key in self._apart or key in self._alive:
            return
        storage = t.untyped_storage()
        size = storage.nbytes()
        self._alive[key] = weakref.finalize(storage, self._drop, key, size)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)

    def _drop(self, key: int, size: int) -> None:
        self.bytes -= size
        del self._alive[key]


def _key(t: Tensor) -> int:
    return int(t.untyped_storage()._cdata)


def of_step(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    loss: Callable[[], Tensor],
    adapted: Iterable[str],
) -> dict[str, Any]:
    """saved: bytes autograd keeps; held: bytes alive between forward and backward, saved or not;
    peak: most bytes alive during both, gradients included; kept: what was saved. Parameters,
    buffers and the batch are in none of them.
    """
    apart = list(batch.values())
    counter = SavedBytes(model, apart, adapted)
    with counter.counting():
        out = loss()
    saved, kept = counter.bytes, counter.kept
    del out, counter
    with Live([*model.parameters(), *model.buffers(), *apart]) as live:
        out = loss()
        held = live.bytes
        out.backward()  # type: ignore[no-untyped-call]
        del out
    for p in model.parameters():
        p.grad = None
    return {"saved": saved, "held": held, "peak": live.peak, "kept": kept}


def of_process(contender: str, setup: Mapping[str, Any], threads: int) -> dict[str, float]:
    """Peak resident bytes of a process of its own that builds the contender and takes two whole
    steps.
    """
    asked = json.dumps({"contender": contender, "setup": dict(setup), "threads": threads})
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.peak", asked],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"the process that measures {contender} failed:\n{done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found
