"""Notices that a model no longer has the layers that its adapters were attached to.

A layer that was replaced after attach (a new head, a resized embedding) takes its adapters out of
the model, and a weight that has been tied since is merged into both of its readers. What the
adapters rest on is noted at attach and looked at in every forward of the model: the places of the
modules and of their weights, fifty nanoseconds each. Only if one of them holds something else are
the reasons looked for.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..errors import WeftError
from ..methods import stacked
from . import statistics
from .adapter import Adapter
from .base_layers import BaseLayer, own_class
from .carried import forget_offloaded, is_adapted
from .layer import AdapterLayer
from .offload import HOOK, offloads, take_back
from .swapped import OWN

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
        self.homes: dict[nn.Module, tuple[str, ...]] = {}  # all names of each module, as attached
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
        self._find_homes(state)
        for adapter in state.adapters.values():
            layers = adapter.every_layer()
            first = next(iter(layers.values()), None)
            if first is not None:  # accelerate's hooks come on all layers, or on none
                self._note(first.__dict__, HOOK)
            for name, layer in layers.items():
                module, tensor = layer.base.module, layer.base.tensor
                if noting.add(self.homes.get(module, (name,)), module, tensor):
                    self._note(module._parameters, tensor)
                    if _SIZE in module.__dict__:
                        self._note(module.__dict__, _SIZE)
            for selected in adapter.selected_tensors.values():
                for module, tensor in selected.holders:
                    self._trained.append((module._parameters, tensor))
                    if noting.add(self.homes.get(module, ("?",)), module):
                        self._note(module.__dict__, HOOK)
        for module in state.virtual.hooked if state.virtual is not None else ():
            noting.add(self.homes.get(module, ("?",)), module)
        if any(adapter.config.freeze_batch_norm for adapter in state.adapters.values()):
            for name, module in statistics.with_statistics(state.root).items():
                noting.add((name,), module)
        self._known = True

    def _find_homes(self, state: Any) -> None:
        """Adds the names of new modules; those of others stay as they were at their attach."""
        modules = {layer.base.module for a in state.adapters.values() for layer in _layers(a)}
        for adapter in state.adapters.values():
            modules |= {m for s in adapter.selected_tensors.values() for m, _ in s.holders}
        modules |= set(state.virtual.hooked) if state.virtual is not None else set()
        known = {m: names for m, names in self.homes.items() if m in modules}
        found: dict[nn.Module, list[str]] = {}
        if len(known) < len(modules):
            for name, module in state.root.named_modules(remove_duplicate=False):
                if module in modules and module not in known:
                    found.setdefault(module, []).append(name)
        self.homes = {**known, **{m: tuple(names) for m, names in found.items()}}

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
        self._added: set[tuple[nn.Module, str]] = set()
        self._seen: set[tuple[int, str]] = set()

    def add(self, names: Sequence[str], module: nn.Module, tensor: str = "") -> bool:
        """Notes the ways to a module and its tensor, by all of its names. Returns False if that has
        been done.
        """
        if (module, tensor) in self._added:
            return False
        self._added.add((module, tensor))
        for name in names:
            self._add(name, module)
        return True

    def _add(self, name: str, module: nn.Module) -> None:
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


def _copies(state: Any) -> set[int]:
    trained = [s for each in state.adapters.values() for s in each.selected_tensors.values()]
    return {id(t) for s in trained for t in (s.original, s.trained)}


def _borrowed(state: Any) -> bool:
    """Whether torch.func has put tensors in the place of weights, for one call."""
    weights = (
        layer.base_weight for adapter in state.adapters.values() for layer in _layers(adapter)
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
    modules, homes = set(root.modules()), state.wiring.homes
    known, found = _copies(state), []
    for name, layer in adapter.every_layer().items():
        base = layer.base
        _take_back(layer, base.module)
        elsewhere = _left(root, modules, base.module, homes.get(base.module, (name,)))
        if elsewhere is not None:
            found.append(_replaced(root, adapter.name, elsewhere, base.module))
        elif not isinstance(base, BaseLayer):
            continue
        elif not hasattr(type(base.host), OWN):
            found.append(_exchanged(name, base.host, adapter.name))
        elif (
            now := stacked.known((base.out_features, base.in_features), base.stack)
        ) != layer.full_shape:
            found.append(
                f"{name!r} has a weight of {list(now)} (out, in), and had {list(layer.full_shape)} when adapter "
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
            names = homes.get(module, (name.rpartition(".")[0],))
            elsewhere = _left(root, modules, module, names)
            if elsewhere is not None:
                found.append(_replaced(root, adapter.name, elsewhere, module))
            elif id(live) not in known and (whole or type(live) is nn.Parameter):
                found.append(
                    f"{f'{names[0]}.{tensor}'.lstrip('.')!r}, which adapter {adapter.name!r} trains as a "
                    "copy, was replaced by another "
                    "tensor after attach."
                )
    found += [
        f"the {own_class(module).__name__} where the virtual tokens of adapter {adapter.name!r} enter was "
        "replaced after attach."
        for module in (
            virtual.hooked if virtual is not None and adapter.name in virtual.configs else ()
        )
        if module not in modules
    ]
    found += [
        f"{name!r} ({own_class(module).__name__}) keeps running statistics, and came into the model after "
        f"adapter {adapter.name!r}, which freezes them (freeze_batch_norm), was attached."
        for name, module in (
            statistics.thawed(root) if adapter.config.freeze_batch_norm else {}
        ).items()
    ]
    return list(dict.fromkeys(found + _tied(root, adapter)))


def _take_back(layer: AdapterLayer, module: nn.Module) -> None:
    if take_back(layer) and offloads(module) and is_adapted(module):
        forget_offloaded(module)


def _exchanged(name: str, module: nn.Module, adapter: str) -> str:
    return (
        f"{name!r}: the class of {type(module).__name__} was exchanged after adapter {adapter!r} was "
        "attached, so its adapter does not run."
    )


def _layers(adapter: Adapter) -> Iterable[AdapterLayer]:
    return adapter.every_layer().values()


def _left(
    root: nn.Module, modules: set[nn.Module], module: nn.Module, names: Sequence[str]
) -> str | None:
    """Returns the first of a module's names under which the model now has another one, or none;
    None if there is no such name. `modules`: all of the model.
    """
    if module not in modules:
        return names[0]
    for name in names if len(names) > 1 else ():  # one that is there goes by its only name
        try:
            here = root.get_submodule(name)
        except AttributeError:  # a wrapper around it
            continue
        if module not in set(here.modules()):
            return name
    return None


def _replaced(root: nn.Module, adapter: str, name: str, old: nn.Module) -> str:
    try:
        new = f"by {own_class(root.get_submodule(name)).__name__} "
    except AttributeError:
        new = "or taken out "
    return (
        f"{name!r} ({own_class(old).__name__}) was replaced {new}after adapter {adapter!r} was attached, "
        "so its adapter is no longer in the model."
    )


@dataclass(frozen=True)
class _Weight:
    """A base tensor that an adapter changes, as it is and as a copy. `places`: where the model may
    read it.
    """

    name: str
    tensors: tuple[Tensor, ...]
    places: Collection[tuple[nn.Module, str]]
    act: str  # what changes it


def _weights(adapter: Adapter) -> Iterator[_Weight]:
    """Yields all of them: the layers' weights, the tables of new tokens, and what trains as a copy."""
    for name, layer in adapter.every_layer().items():
        module, base = layer.base.module, layer.base
        weight = layer.base_weight
        if isinstance(base, BaseLayer) and base.has_weight and weight is not None:
            readers = _readers(adapter, name) or {name: module}
            places = {(m, base.tensor) for m in readers.values()}
            yield _Weight(base.full_name(name), (weight,), places, "merging")
    for name, selected in adapter.selected_tensors.items():
        both = selected.original, selected.trained
        yield _Weight(name, both, set(selected.holders), "training")


def _readers(adapter: Adapter, name: str) -> dict[str, nn.Module]:
    """The modules that read one table of new tokens, by name; none if `name` is of no table."""
    layers = adapter.token_layers
    if name not in layers:
        return {}
    rows = layers[name]._parameters["rows"]  # which torch.func may have replaced for a call
    return {n: x.base.module for n, x in layers.items() if x._parameters["rows"] is rows}


def _tied(root: nn.Module, adapter: Adapter) -> list[str]:
    """Weights of the adapter that other layers read too, which attach refuses; and tables of new
    tokens that are no longer one table.
    """
    known: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for name, module in root.named_modules():
        for tensor, p in module._parameters.items():
            if p is not None:
                full = f"{name}.{tensor}".lstrip(".")
                known.setdefault(memory_of(p), []).append((full, module, tensor))
    found = []
    for weight in _weights(adapter):
        others = [
            full
            for t in weight.tensors
            for full, module, tensor in known.get(memory_of(t), ())
            if (module, tensor) not in weight.places
        ]
        if others:
            found.append(
                f"{weight.name!r} and {others[0]!r} have shared one weight since adapter "
                f"{adapter.name!r} was attached (tie_weights?), so {weight.act} it would change both."
            )
    return found + _untied(adapter)


def _untied(adapter: Adapter) -> list[str]:
    found = []
    for name in adapter.token_layers:
        readers = _readers(adapter, name)
        if name != next(iter(readers)):
            continue
        stored = {n: m._parameters.get("weight") for n, m in readers.items()}
        if any(type(t) is not nn.Parameter or t.is_meta for t in stored.values()):
            continue  # borrowed by torch.func, or offloaded
        own = {n: memory_of(t) for n, t in stored.items() if t is not None}
        other = next((n for n in own if own[n] != own[name]), None)
        if other is not None:
            found.append(
                f"{f'{name}.weight'.lstrip('.')!r} and {f'{other}.weight'.lstrip('.')!r} were one weight "
                f"when adapter {adapter.name!r} was attached, and are two now, with one set of new rows."
            )
    return found


def memory_of(p: Tensor) -> int:
    """What two parameters with the same numbers have in common."""
    plain = type(p) in (Tensor, nn.Parameter) and not p.is_meta and p.numel()
    try:
        return p.data_ptr() if plain else -id(p)
    except RuntimeError:  # of torch.func, without memory
        return -id(p)
