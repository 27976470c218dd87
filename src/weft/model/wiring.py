"""Notices that a model no longer has the layers that its adapters were attached to.

A layer that was replaced after attach (a new head, a resized embedding) takes its adapters out of
the model, and a weight that has been tied since is merged into both of its readers. What the
adapters rest on is noted at attach and looked at in every forward of the model: the places of the
modules and of their weights, fifty nanoseconds each. Only if one of them holds something else are
the reasons looked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..errors import WeftError
from .adapter import Adapter
from .base_layers import BaseLayer, own_class
from .layer import forget_offloaded, is_adapted
from .offload import HOOK, offloads, take_back

_SHOWN = 3
# What transformers sets if it resizes an embedding, which keeps its Parameter.
_SIZE = "num_embeddings"
CURE = (
    "Change the model before weft.attach: put the old layer back, or weft.detach the adapter, change the "
    "model, and attach or load again."
)


class Wiring:
    """The places that one model's adapters rest on. A copy notes its own."""

    def __init__(self) -> None:
        self._known = False
        self._places: list[tuple[Mapping[str, Any], str, Any]] = []
        self._trained: list[
            tuple[Mapping[str, Any], str]
        ] = []  # of tensors that are trained as copies
        self._copies: set[int] = set()  # which these places may hold, and the originals

    def __reduce__(self) -> Any:
        return Wiring, ()

    def note(self, state: Any) -> None:
        """Notes the places: after attach and detach, and after a change that takes nothing away."""
        self._places, self._trained = [], []
        self._copies = _copies(state)
        self._note(state.root.__dict__, HOOK)
        noting = _Paths(state.root, self._places)
        for adapter in state.adapters.values():
            first = next(iter(adapter.layers.values()), None)
            if first is not None:  # accelerate's hooks come on all layers, or on none
                self._note(first.__dict__, HOOK)
            for name, layer in adapter.layers.items():
                module = layer.base.module
                if noting.add(name, module):
                    self._note(module._parameters, "weight")
                    if _SIZE in module.__dict__:
                        self._note(module.__dict__, _SIZE)
            for name, selected in adapter.selected_tensors.items():
                self._trained += [
                    (module._parameters, tensor) for module, tensor in selected.holders
                ]
                module = selected.holders[0][0]
                if noting.add(name.rpartition(".")[0], module):
                    self._note(module.__dict__, HOOK)
        if state.virtual is not None:
            names = {module: name for name, module in state.root.named_modules()}
            for module in state.virtual.hooked:
                noting.add(names.get(module, "?"), module)
        self._known = True

    def _note(self, place: Mapping[str, Any], name: str) -> None:
        self._places.append((place, name, place.get(name)))

    def check(self, state: Any) -> None:
        """Called in every forward. Raises WeftError if an adapter's layer is no longer in the
        model.
        """
        if self._known:
            for place, name, thing in self._places:
                if place.get(name) is not thing:
                    break
            else:
                for place, name in self._trained:
                    if id(place.get(name)) not in self._copies:
                        break
                else:
                    return
        found = [p for adapter in state.adapters.values() for p in problems(state, adapter)]
        if found:
            raise WeftError(message(found))
        if not _borrowed(state):
            self.note(state)


class _Paths:
    """Notes the modules on the way from the root to those that adapters are on, each once."""

    def __init__(self, root: nn.Module, places: list[tuple[Mapping[str, Any], str, Any]]) -> None:
        self._root, self._places = root, places
        self._added: set[nn.Module] = set()
        self._seen: set[tuple[int, str]] = set()

    def add(self, name: str, module: nn.Module) -> bool:
        """Notes the way to a module. Returns False if that has been done."""
        if module in self._added:
            return False
        self._added.add(module)
        here: nn.Module | None = self._root
        parts = name.split(".") if name else []
        for i, part in enumerate(parts):
            if here is None:
                break
            child = here._modules.get(part)
            last = i + 1 == len(parts)
            if child is None or (last and module not in set(child.modules())):
                child = module  # it is not there; a wrapper around it would be as good
            if (id(here), part) not in self._seen:
                self._seen.add((id(here), part))
                self._places.append((here._modules, part, child))
            here = here._modules.get(part)
        return True


def _copies(state: Any) -> set[int]:
    trained = [s for each in state.adapters.values() for s in each.selected_tensors.values()]
    return {id(t) for s in trained for t in (s.original, s.trained)}


def _borrowed(state: Any) -> bool:
    """Whether torch.func has put tensors in the place of weights, for one call."""
    weights = (
        layer.base.module._parameters.get("weight")
        for adapter in state.adapters.values()
        for layer in adapter.layers.values()
    )
    return any(weight is not None and not isinstance(weight, nn.Parameter) for weight in weights)


def message(found: list[str]) -> str:
    """Returns the problems as one text with the cure."""
    more = f" And {len(found) - _SHOWN} more." if len(found) > _SHOWN else ""
    return f"{' '.join(found[:_SHOWN])}{more} {CURE}"


def problems(state: Any, adapter: Adapter, whole: bool = False) -> list[str]:
    """Returns what of an adapter is no longer in the model of this state, one sentence each.
    `whole`: a tensor that it trains as a copy must not have been sharded or borrowed by torch.func
    either. What accelerate has offloaded of the adapter since is taken back.
    """
    root, virtual = state.root, state.virtual
    modules = set(root.modules())
    known, found = _copies(state), []
    for name, layer in adapter.layers.items():
        base = layer.base
        if take_back(layer) and offloads(base.module) and is_adapted(base.module):
            forget_offloaded(base.module)
        if base.module not in modules:
            found.append(_replaced(root, adapter.name, name, base.module))
        elif (
            isinstance(base, BaseLayer)
            and (now := (base.out_features, base.in_features)) != layer.shape
        ):
            found.append(
                f"{name!r} has a weight of {list(now)} (out, in), and had {list(layer.shape)} when adapter "
                f"{adapter.name!r} was attached (resized?)."
            )
    for name, selected in adapter.selected_tensors.items():
        if any(offloads(module) for module, _ in selected.holders):
            found.append(
                f"{name!r}, which adapter {adapter.name!r} trains as a copy, has been offloaded by accelerate "
                "since attach, which loads its own copy whatever adapter is active. Merge the adapter "
                "first, or keep the tensor on a device."
            )
        for module, tensor in selected.holders:
            live = module._parameters.get(tensor)
            if module not in modules:
                found.append(_replaced(root, adapter.name, name.rpartition(".")[0], module))
            elif id(live) not in known and (whole or type(live) is nn.Parameter):
                found.append(
                    f"{name!r}, which adapter {adapter.name!r} trains as a copy, was replaced by another "
                    "tensor after attach."
                )
    found += [
        f"the {own_class(module).__name__} where the virtual tokens of adapter {adapter.name!r} enter was "
        "replaced after attach."
        for module in (virtual.hooked if virtual is not None else ())
        if module not in modules
    ]
    return list(dict.fromkeys(found + _tied(root, adapter)))


def _replaced(root: nn.Module, adapter: str, name: str, old: nn.Module) -> str:
    try:
        new = f"by {own_class(root.get_submodule(name)).__name__} "
    except AttributeError:
        new = "or taken out "
    return (
        f"{name!r} ({own_class(old).__name__}) was replaced {new}after adapter {adapter!r} was attached, "
        "so its adapter is no longer in the model."
    )


def _tied(root: nn.Module, adapter: Adapter) -> list[str]:
    """Adapted weights that other layers read too; attach refuses those."""
    readers: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for name, module in root.named_modules():
        for tensor, p in module._parameters.items():
            if p is not None:
                full = f"{name}.{tensor}".lstrip(".")
                readers.setdefault(memory_of(p), []).append((full, module, tensor))
    found = []
    for name, layer in adapter.layers.items():
        own, base = layer.base.module, layer.base
        weight = own._parameters.get("weight")
        if not isinstance(base, BaseLayer) or not base.has_weight or weight is None:
            continue
        others = [
            full
            for full, module, tensor in readers.get(memory_of(weight), ())
            if (module, tensor) != (own, "weight")
        ]
        if others:
            found.append(
                f"{f'{name}.weight'.lstrip('.')!r} and {others[0]!r} have shared one weight since adapter "
                f"{adapter.name!r} was attached (tie_weights?), so merging it would change both."
            )
    return found


def memory_of(p: Tensor) -> int:
    """What two parameters with the same numbers have in common."""
    plain = type(p) in (Tensor, nn.Parameter) and not p.is_meta and p.numel()
    try:
        return p.data_ptr() if plain else -id(p)
    except RuntimeError:  # of torch.func, without memory
        return -id(p)
