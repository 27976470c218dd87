"""Notices adapted layers that a model never calls because it reads their weight itself.

A model that computes `F.linear(x, layer.weight)` does not run the layer, so the adapter on it does
nothing; and merging it would change the outputs. After the first forward with an adapter, the
layers that did not run are known. If there are any, the next forward is watched for operations that
take their weights. Layers that are neither called nor read (an expert without tokens, an unused
pooler) are fine.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn, overrides
from torch.overrides import TorchFunctionMode

from ..errors import WeftError
from ..ops.input_cache import runs
from .adapter import Adapter
from .base_layers import BaseLayer


class Reads(TorchFunctionMode):
    """While it is on, `found` gets the names of the layers whose weights an operation takes."""

    def __init__(self, layers: Mapping[str, Any]) -> None:
        super().__init__()
        self.layers = layers
        self.found: dict[str, str] = {}  # layer -> the operation
        self._names = {id(layer.base.module.weight): name for name, layer in layers.items()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not torch.compiler.is_compiling() and isinstance(out, Tensor):
            for name in map(self._names.get, map(id, _flat((args, (kwargs or {}).values())))):
                if name is not None:
                    self.found.setdefault(name, getattr(func, "__name__", "an operation"))
        return out

    def problem(self, adapter: str) -> str | None:
        """Returns the layers that were read and did not run, as a sentence, or None."""
        names = [name for name in self.found if not self.layers[name].ran]
        if not names:
            return None
        more = f" and of {len(names) - 1} more" if len(names) > 1 else ""
        return (
            f"the model never calls {names[0]!r} but reads its weight ({self.found[names[0]]}){more}, so "
            f"adapter {adapter!r} does nothing there, and merging it would change the outputs. Leave "
            f"{'it' if len(names) == 1 else 'them'} out of targets."
        )


def _flat(values: Iterable[Any]) -> Iterable[Any]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple | type({}.values())):
            yield from _flat(value)


def silent(adapter: Adapter) -> dict[str, Any]:
    """Returns the layers of an adapter that have a weight and have never run."""
    return {
        name: layer
        for name, layer in adapter.layers.items()
        if not layer.ran and isinstance(layer.base, BaseLayer) and _weight(layer) is not None
    }


def _weight(layer: Any) -> Tensor | None:
    found: Tensor | None = layer.base.module._parameters.get("weight")
    return found


class Uncalled:
    """The adapters of one model whose layers have not all run yet. A copy starts empty."""

    def __init__(self) -> None:
        self._first: set[str] = set()  # no forward yet
        self._second: set[str] = set()  # some layers did not run in the first
        self._watch: tuple[str, Reads, Any] | None = None  # the adapter, and the call of the model
        self.paused = False  # while merge looks by itself

    def __reduce__(self) -> Any:
        return Uncalled, ()

    def __bool__(self) -> bool:
        return bool(self._first or self._second or self._watch) and not self.paused

    def add(self, adapter: Adapter) -> None:
        """Looks at the first forwards of a new adapter."""
        if any(isinstance(layer.base, BaseLayer) for layer in adapter.layers.values()):
            self._first.add(adapter.name)

    def drop(self, name: str) -> None:
        """Forgets a detached adapter."""
        self._first.discard(name)
        self._second.discard(name)

    def enter(self, adapters: Mapping[str, Adapter], active: Any, call: Any) -> None:
        """Called when a forward begins, with its active adapter and the frame of its call."""
        if self._watch is not None and not runs(self._watch[2]):  # an interrupt has ended it
            self._stop_watching()
        if active in self._second and self._watch is None:
            self._second.discard(active)
            layers = silent(adapters[active])
            if layers:
                self._watch = (active, Reads(layers), call)
                self._watch[1].__enter__()  # type: ignore[no-untyped-call]

    def _stop_watching(self) -> None:
        reads = self._watch[1] if self._watch is not None else None
        self._watch = None
        mode: Any = overrides._get_current_function_mode()  # type: ignore[no-untyped-call]
        if reads is not None and mode is reads:
            reads.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def leave(
        self, root: nn.Module, adapters: Mapping[str, Adapter], active: Any, call: Any, ended: bool
    ) -> None:
        """Called when a forward ends; `ended`: with a result. Raises WeftError if layers of the
        active adapter are read and never called.
        """
        if self._watch is not None and self._watch[2] is call:
            name, reads, _ = self._watch
            self._stop_watching()
            problem = reads.problem(name)
            if ended and problem is not None:
                self._second.add(name)  # so is the next forward
                raise WeftError(problem[0].upper() + problem[1:])
        if ended and active in self._first:
            self._first.discard(active)
            layers = silent(adapters[active])
            if len(layers) == len(adapters[active].layers) and not root.training:
                self._first.add(active)
                raise WeftError(
                    f"none of the {len(layers)} layers of adapter {active!r} was called in this forward "
                    f"({next(iter(layers))!r}, ...), so it does nothing: the model reads their weights "
                    "itself, or does not use them. Choose other targets."
                )
            if layers:
                self._second.add(active)
