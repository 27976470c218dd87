"""Notices adapted layers whose weight the model reads itself, past the adapter.

A model that computes `F.linear(x, layer.weight)` does not run the layer: if it never does, the
adapter on it does nothing, and merging it would change the outputs; if it calls the layer as well,
merging would change what the adapter leaves alone. So the first forward with an adapter, in each
mode, is watched for operations that take the weights of its layers outside of the layers' own
calls; and one more, if layers did not run in it. Layers that are neither called nor read (an expert
without tokens, a vision tower without an image) are fine.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn, overrides
from torch.overrides import TorchFunctionMode

from ..errors import WeftError
from ..ops.input_cache import runs
from .active import Active, names_of
from .adapter import Adapter
from .base_layers import BaseLayer
from .gate import CALL
from .held import inside, standing_in
from .layer import AdapterLayer, adapted_forward

_FORWARDS = 2  # that are watched if layers do not run
_CALLS = (CALL, adapted_forward.__code__)
_OF_SELF = {
    "to",
    "type_as",
    "expand_as",
    "view_as",
    "reshape_as",
}  # of another tensor: its form only


_AWAY = {"numpy", "__array__", "__dlpack__", "tolist"}  # what leaves torch


class Reads(TorchFunctionMode):
    """While it is on, `found` gets the layers whose weight an operation reads outside the calls of
    their modules, and the name of the first such operation.
    """

    def __init__(self, layers: Iterable[AdapterLayer]) -> None:
        super().__init__()
        self.found: dict[AdapterLayer, str] = {}
        self.on = True
        self.call: Any = None  # the frame of the model's call
        self._readers: dict[int, list[AdapterLayer]] = {}  # of the memory of a weight
        for layer in layers:
            weight = layer.base_weight
            if weight is not None and not weight.is_meta:
                self._readers.setdefault(_memory(weight), []).append(layer)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.on and not torch.compiler.is_compiling():
            self._look(func, args, kwargs or {}, out)
        return out

    def _look(self, func: Any, args: Any, kwargs: Mapping[str, Any], out: Any) -> None:
        known = self._readers
        used = {m for t in _flat((args, kwargs.values())) if (m := _memory(t)) in known}
        if not used:
            return
        name = _name(func)
        if name.startswith("new_") or name.endswith("_like") or name == "grad":
            return  # its form only
        if name in _OF_SELF:
            used &= {_memory(t) for t in args[:1] if isinstance(t, Tensor)}
        made = {_memory(t) for t in _flat((out,))}
        for memory in used:
            if not made - {memory} and name not in _AWAY:
                continue  # a view of the weight, or the weight was written to
            if not _in_a_call_of([layer.base for layer in known[memory]]):
                self.found = {**dict.fromkeys(known[memory], name), **self.found}


def _name(func: Any) -> str:
    name: str = getattr(func, "__name__", "an operation")
    if name == "__get__":  # of an attribute
        name = getattr(getattr(func, "__self__", None), "__name__", name)
    return name


def _memory(t: Tensor) -> int:
    """What a tensor and its views have in common."""
    if type(t) not in (Tensor, nn.Parameter):
        return -id(t)
    try:
        return int(t.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):  # of torch.func, without memory
        return -id(t)


def _in_a_call_of(bases: Collection[Any]) -> bool:
    """Whether this thread is inside a call of one of these layers; or, of a weight that its module
    reads itself, makes W' of it or runs the module without an adapter.
    """
    called = [base.module for base in bases if not base.hosted]
    hosts = [base.host for base in bases if base.hosted]
    frame: Any = sys._getframe(2)
    while frame is not None:
        code, seen = frame.f_code, frame.f_locals
        if code in _CALLS and any(seen.get("self") is m for m in called):
            return True
        makes = code is standing_in.__code__ or (code is inside.__code__ and seen["choice"] is None)
        if makes and any(seen["host"] is m for m in hosts):
            return True
        frame = frame.f_back
    return False


def _flat(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple | type({}.values())):
            yield from _flat(value)


def weighted_layers(adapter: Adapter) -> dict[str, AdapterLayer]:
    """Returns the layers of an adapter that stand for a weight which the model could read."""
    return {
        name: layer
        for name, layer in adapter.every_layer().items()
        if isinstance(layer.base, BaseLayer) and layer.base_weight is not None
    }


class Uncalled:
    """What is known of one model's reads of adapted weights. A copy knows as much."""

    def __init__(self) -> None:
        # Forwards of (adapter, training mode) that are yet to be looked at.
        self._left: dict[tuple[str, bool], int] = {}
        self._read: dict[str, dict[str, str]] = {}  # adapter -> layer -> the operation
        self._warned: set[str] = set()
        self._watches: dict[int, tuple[Reads, Any]] = {}  # by thread, with the call of the model
        self.paused = False  # while merge looks by itself

    def __reduce__(self) -> Any:
        read = {name: dict(found) for name, found in self._read.items()}
        kept = {"_left": dict(self._left), "_read": read, "_warned": set(self._warned)}
        return Uncalled, (), kept

    def __bool__(self) -> bool:
        return bool(self._left or self._watches) and not self.paused

    def add(self, adapter: Adapter) -> None:
        """Looks at the first forwards of a new adapter."""
        if weighted_layers(adapter):
            for training in (False, True):
                self._left[adapter.name, training] = _FORWARDS

    def drop(self, name: str) -> None:
        """Forgets a detached adapter."""
        for training in (False, True):
            self._left.pop((name, training), None)
        self._read.pop(name, None)
        self._warned.discard(name)

    def enter(
        self, root: nn.Module, adapters: Mapping[str, Adapter], active: Active, call: Any
    ) -> None:
        """Called when a forward begins, with what is active and the frame of its call."""
        thread = threading.get_ident()
        _end_interrupted()
        if thread in self._watches and not runs(self._watches[thread][1]):
            self._stop(thread)
        left = {n: k for n in names_of(active) if (k := self._left.get((n, root.training)))}
        if not left or thread in self._watches:
            return
        silent = _disturbed(root)  # then only what is worth it
        layers = [
            layer
            for name, k in left.items()
            if name in adapters and not (silent and k == _FORWARDS)
            for layer in weighted_layers(adapters[name]).values()
            if not (silent and layer.ran)
        ]
        if layers:
            reads = Reads(layers)
            self._watches[thread], reads.call = (reads, call), call
            reads.__enter__()  # type: ignore[no-untyped-call]

    def _stop(self, thread: int) -> Reads:
        reads, _ = self._watches.pop(thread)
        reads.on = False
        mode: Any = overrides._get_current_function_mode()  # type: ignore[no-untyped-call]
        if mode is reads:
            reads.__exit__(None, None, None)
        return reads

    def leave(
        self,
        root: nn.Module,
        adapters: Mapping[str, Adapter],
        active: Active,
        call: Any,
        ended: bool,
    ) -> None:
        """Called when a forward ends; `ended`: with a result. Raises WeftError if layers of an
        active adapter are read and never called.
        """
        thread = threading.get_ident()
        watch = self._watches.get(thread)
        if watch is not None and watch[1] is not call:  # a forward within the one that is watched
            return
        reads = self._stop(thread) if watch is not None else None
        for name in names_of(active) if ended else ():
            left = self._left.pop((name, root.training), 0)
            if left and name in adapters:
                self._look(adapters[name], reads, left, root.training)

    def _look(self, adapter: Adapter, reads: Reads | None, left: int, training: bool) -> None:
        if reads is not None:
            self.note(adapter, reads)
        problem = self.problem(adapter)
        layers = weighted_layers(adapter)
        silent = [name for name, layer in layers.items() if not layer.ran]
        if problem is not None or (silent and left > 1):
            self._left[adapter.name, training] = max(1, left - 1)
        if problem is not None:
            raise WeftError(problem[0].upper() + problem[1:])
        more = self.reread(adapter)
        if more is not None:
            self._warn(adapter.name, more)
        elif len(silent) == len(adapter.every_layer()) and not training:
            self._warn(
                adapter.name,
                f"none of the {len(silent)} layers of adapter {adapter.name!r} was called in this "
                f"forward ({silent[0]!r}, ...), so it changed nothing. If no input reaches them, choose "
                "other targets.",
            )

    def _warn(self, name: str, text: str) -> None:
        if name not in self._warned:
            self._warned.add(name)
            warnings.warn(text[0].upper() + text[1:], stacklevel=2)

    def note(self, adapter: Adapter, reads: Reads) -> None:
        """Adds what has been read of an adapter's layers."""
        for name, layer in adapter.every_layer().items():
            if layer in reads.found:
                self._read.setdefault(adapter.name, {}).setdefault(name, reads.found[layer])

    def problem(self, adapter: Adapter) -> str | None:
        """Returns the layers that were read and have never run, as a sentence, or None."""
        found, layers = self._read.get(adapter.name, {}), adapter.every_layer()
        names = [name for name in found if name in layers and not layers[name].ran]
        if not names:
            return None
        more = f" and of {len(names) - 1} more" if len(names) > 1 else ""
        return (
            f"the model never calls {names[0]!r} but reads its weight ({found[names[0]]}){more}, so "
            f"adapter {adapter.name!r} does nothing there, and merging it would change the outputs. "
            f"Leave {'it' if len(names) == 1 else 'them'} out of {_field(adapter, names[0])}."
        )

    def reread(self, adapter: Adapter) -> str | None:
        """Returns the layers that were read beside their calls, as a sentence, or None; for methods
        that change weights.
        """
        found, layers = self._read.get(adapter.name, {}), adapter.every_layer()
        names = [n for n in found if n in layers and layers[n].ran and layers[n].method.mergeable]
        if not names:
            return None
        more = f" and of {len(names) - 1} more" if len(names) > 1 else ""
        return (
            f"the model calls {names[0]!r} and also reads its weight itself ({found[names[0]]}){more}: "
            f"there adapter {adapter.name!r} does nothing, and merged it would. Leave "
            f"{'it' if len(names) == 1 else 'them'} out of {_field(adapter, names[0])}, or do not merge."
        )


def _end_interrupted() -> None:
    """Takes off the watches of forwards, of any model, that an interrupt ended in this thread:
    torch calls no hook then.
    """
    while True:
        mode: Any = overrides._get_current_function_mode()  # type: ignore[no-untyped-call]
        if not isinstance(mode, Reads) or mode.call is None or runs(mode.call):
            return
        mode.on = False
        mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]


def _field(adapter: Adapter, name: str) -> str:
    return "new_tokens" if name in adapter.token_layers else "targets"


def _disturbed(root: nn.Module) -> bool:
    """Whether a function mode changes how a model computes: torch does not take its fused kernels
    for attention, which round otherwise and fill padding with zeros, and compiles again.
    """
    kinds = nn.TransformerEncoderLayer | nn.MultiheadAttention
    return any(
        isinstance(m, kinds) or "_orig_mod" in m._modules or m._compiled_call_impl is not None
        for m in root.modules()
    )
