"""Attaches adapters to a model in place."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from .. import methods
from ..errors import ConfigError, TargetError
from ..methods.base import PromptMethod, Shared
from ..methods.config import LayerConfig
from ..methods.rng import Rng
from ..methods.target_spec import KEYWORDS, patterns
from . import base_layers, fallback, held, left_out, prompts, statistics, token_layers
from .adapter import Adapter
from .attach_checks import check_fits, check_hosts, check_name, check_ownership, check_tied
from .carried import adapt, is_adapted, put
from .detach import remove
from .experts import StackedLayer, adapted_experts_class
from .layer import AdapterLayer, adapted_class
from .offload import check_loadable, loaded
from .plan_entries import Frozen
from .saving import tell_trainers
from .selected import select
from .state import ATTRIBUTE, State, base_only, find_state, unwrapped
from .stepping import follow, follows
from .steps_watch import Watch
from .structure import Structure, targets
from .structure.selection import tensors_of_modules, trained_tensors, unread_tensors, unsupported
from .structure.tokens import token_tables
from .use import check_as_able

_attaching = threading.RLock()


@dataclass(frozen=True)
class Parts:
    """The parts of an adapter in one model: a configuration per module, base tensors trained as
    copies, and frozen tensors with the reason why. `routed`: modules whose tokens a router has
    regrouped. `filled`: modules all of whose tensors are read from a file.
    """

    configs: Mapping[str, Any]
    selected: Sequence[str] = ()
    frozen: Sequence[Frozen] = ()
    routed: Sequence[str] = ()
    filled: Collection[str] = ()


def attach(model: nn.Module, config: Any, name: str = "default") -> Adapter:
    """Attaches `config` to `model` in place, freezes the base, activates the adapter, and returns
    its handle.

    There is no wrapper, and no base parameter is renamed. The output is unchanged until the adapter
    is trained, except for methods with `starts_at_base = False` (Prefix, PreEmbed, PreLayer). If
    attaching fails, the model is unchanged. A model can have several adapters with different names.
    Gradients that the base still has are dropped: an optimiser would apply them to frozen weights.

    Raises ConfigError (not a Weft configuration, bad name), TargetError (the targets do not fit the
    model), WeftError (the name is taken), MergeError (an adapter is merged). Warns if
    targets="all-linear" leaves out much of the model, in layers of a kind that it does not mean.
    """
    adapter = attach_noted(model, config, name)
    for note in adapter.notes:
        warnings.warn(note, stacklevel=2)
    return adapter


def attach_noted(model: nn.Module, config: Any, name: str = "default") -> Adapter:
    """Attaches as `attach` does. What `attach` warns of is in the adapter's notes only."""
    if type(config) not in methods.METHODS.values():
        raise ConfigError(
            f"attach(config={config!r}): write a Weft configuration, for example weft.LoRA(r=8). "
            f"Methods: {list(methods.METHODS)}."
        )
    structure = Structure.of(unwrapped(model))
    parts = parts_of(structure, config)
    notes = left_out.check(structure, config, parts.frozen) + left_out.unread(
        structure, parts.frozen
    )
    adapter = attach_resolved(structure, config, parts, name)
    adapter.notes = notes
    return adapter


def parts_of(structure: Structure, config: Any) -> Parts:
    """Resolves a configuration against a model, before the model is changed.

    Raises TargetError if a name in the configuration does not fit the model.
    """
    for tensor, parameter in structure.root.named_parameters():
        if nn.parameter.is_lazy(parameter):
            raise TargetError(
                f"{tensor!r} has no shape before the model's first forward. Run the model once, "
                "then attach."
            )
    saved, whole = tensors_of_modules(structure, config.modules_to_save), config
    if isinstance(config, PromptMethod):
        places, without = prompts.find_places(structure, config.where)
        trained = trained_tensors(structure, whole, (), saved)
        return Parts(dict.fromkeys(places, config), _union(trained, saved), without)
    if not isinstance(config, LayerConfig):
        trained = trained_tensors(structure, config, (), saved)
        return Parts({}, _union(trained, saved), unread_tensors(structure, config))
    found = targets.resolve(structure, config)
    configs = {module: methods.replace(config, dict(over)) for module, over in found.layers.items()}
    for tensor in saved:
        module = tensor.rpartition(".")[0]
        module = tensor if tensor in structure.held else module
        if all(p in KEYWORDS for p, _ in patterns(config.targets)):
            # "all-linear" means all that are not trained in full
            configs.pop(module, None)
        if module in configs:
            raise TargetError(
                f"{module!r} is named by targets and by "
                f"modules_to_save={list(config.modules_to_save)}: "
                "a layer is adapted or trained in full. Take it out of one of the two."
            )
    trained = trained_tensors(structure, config, configs, saved)
    frozen = [*found.frozen, *unread_tensors(structure, config)]
    return Parts(configs, _union(trained, saved), frozen, found.routed)


def _union(first: Sequence[str], second: Sequence[str]) -> list[str]:
    return list(dict.fromkeys([*first, *second]))


def attach_resolved(
    structure: Structure,
    config: Any,
    parts: Parts,
    name: str = "default",
    shared: Mapping[Any, Shared] | None = None,
    fill: Callable[[Adapter], None] | None = None,
    replace: bool = False,
) -> Adapter:
    """Attaches exactly these parts. `shared` has frozen tensors read from a file, by share_key;
    `fill` is called with the adapter before the model is changed, to fill its tensors. `replace`:
    an adapter of that name gives way, as soon as no open block uses it, and what is active stays.

    Raises as `attach` does; everything that can fail happens before the model is changed.
    """
    fallback.refresh()
    root, given = structure.root, dict(shared or {})
    state = find_state(root)
    if replace and state is not None and name in state.adapters:
        with state.open.closed(name):
            return _replace(structure, state, config, parts, name, given, fill)
    with _attaching:  # two threads may both be the first
        state = find_state(root) or State(root)
        with state.gate.alone(f"attach adapter {name!r}"):
            check_name(state, name)
            adapter, modules = _made(structure, state, config, parts, name, given, fill)
            _install(structure, state, adapter, modules)
            state.set_default(name)
            return adapter


def _replace(
    structure: Structure,
    state: State,
    config: Any,
    parts: Parts,
    name: str,
    shared: dict[Any, Shared],
    fill: Callable[[Adapter], None] | None,
) -> Adapter:
    """Builds the new adapter beside the old one, and exchanges them between two forwards."""
    check_name(state, name, taken=True)
    with state.gate.alone(f"replace adapter {name!r}"):
        adapter, modules = _made(structure, state, config, parts, name, shared, fill)
        check_as_able(state.active, adapter, state.adapter(name))
    while True:
        state.open.wait_until_unused(name)
        with state.gate.alone(f"replace adapter {name!r}"):
            if state.open.of(name):  # a nested block has begun in between
                continue
            check_name(state, name, taken=True)
            check_as_able(state.active, adapter, state.adapter(name))
            remove(state, state.adapter(name))
            _install(structure, state, adapter, modules)
            return adapter


def _made(
    structure: Structure,
    state: State,
    config: Any,
    parts: Parts,
    name: str,
    shared: dict[Any, Shared],
    fill: Callable[[Adapter], None] | None,
) -> tuple[Adapter, Mapping[str, base_layers.Site]]:
    """The adapter with its tensors, and the model's modules; the model is not changed."""
    root = structure.root
    if config.freeze_batch_norm and not statistics.with_statistics(root):
        raise TargetError(
            f"freeze_batch_norm=True: {type(root).__name__} has no batch norm that keeps running "
            "statistics. Leave it out."
        )
    with base_only(state):
        modules = base_layers.carriers(dict(root.named_modules()))
        check_ownership(modules, parts.configs, state)
        check_tied(
            structure,
            {
                name: method
                for name, method in parts.configs.items()
                if not isinstance(method, PromptMethod)
            },
        )
        check_hosts(modules, parts.configs)
        check_loadable(root, parts.configs, parts.selected)
        trained = set(parts.selected)
        frozen = [f for f in parts.frozen if trained.isdisjoint((f.name, f"{f.name}.weight"))]
        frozen += unsupported(structure, {f.name for f in frozen} | set(parts.configs))
        adapter = Adapter(name, config, root, frozen=frozen, routed=list(parts.routed))
        adapter.layers = _build_layers(structure, modules, parts, state, shared)
        adapter.selected_tensors = select(structure, parts.selected, config.modules_to_save)
        tables = token_tables(structure, config)
        token_layers.check(tables, parts.configs, adapter.selected_tensors)
        adapter.token_layers = token_layers.build(tables, config)
        adapter.frozen = token_layers.noted(tables, adapter.frozen)
        if fill is not None:
            fill(adapter)
    if not any(True for _ in adapter.parameters()):
        raise TargetError(f"{config!r} finds nothing to train in {type(root).__name__}.")
    return adapter, modules


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """Returns the handles of all adapters on the model by name; empty if there are none."""
    state = find_state(model)
    return dict(state.adapters) if state else {}


def _build_layers(
    structure: Structure,
    modules: Mapping[str, base_layers.Site],
    parts: Parts,
    state: State | None,
    given: Mapping[Any, Shared],
) -> dict[str, AdapterLayer]:
    configs = parts.configs
    views: dict[str, Any] = dict(prompts.hosts_of(structure, configs))
    views |= {name: base_layers.view(modules[name], name) for name in configs if name not in views}
    check_fits(views, configs)
    groups: dict[Any, list[tuple[int, int]]] = {}
    for name, method in configs.items():
        groups.setdefault(method.share_key(), []).append(
            (views[name].out_features, views[name].in_features)
        )
    pool = _pool(state)
    written = any(
        getattr(module, "inplace", False) is True for module in structure.root.modules()
    )  # nn.ReLU(inplace=True)
    layers = {}
    for name, method in configs.items():
        with loaded(base_layers.carrier(modules[name])):
            key, device = method.share_key(), views[name].device
        shared = given.get(key)
        if shared is None and key is not None:
            full = (key, max(o for o, _ in groups[key]), max(i for _, i in groups[key]), device)
            if full not in pool:
                made = method.shared(groups[key], device)
                pool[full] = made
            shared = pool[full]
        kind = AdapterLayer if views[name].stack is None else StackedLayer
        layers[name] = kind(method, views[name], shared)
        layers[name].written = written
        with loaded(base_layers.carrier(modules[name])):
            layers[name].initialise(Rng(method.seed, name, device), name in parts.filled)
        layers[name].train(modules[name].training)
    return layers


def _class_of(layer: AdapterLayer) -> type[nn.Module]:
    if getattr(layer.base, "hosted", False):
        return held.class_of(layer.base.host)
    cls = type(layer.base.module)
    return adapted_experts_class(cls) if isinstance(layer, StackedLayer) else adapted_class(cls)


def _pool(state: State | None) -> dict[Any, Any]:
    """Returns the shared tensors of adapters already on the model, so that equal ones exist only
    once per model.
    """
    layers = (
        [layer for adapter in state.adapters.values() for layer in adapter.layers.values()]
        if state
        else []
    )
    return {
        layer.shared.pool_key(): layer.shared
        for layer in layers
        if layer.shared is not None and layer.shared.pool_key() is not None
    }


def _install(
    structure: Structure, state: State, adapter: Adapter, modules: Mapping[str, base_layers.Site]
) -> None:
    root = structure.root
    if not state.adapters:
        state.required_grad = {name: p.requires_grad for name, p in root.named_parameters()}
        for parameter in root.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None  # an optimiser that has it would go on stepping
        root.__dict__[ATTRIBUTE] = state
        state.watch_root()
        tell_trainers(root, True)
    if isinstance(adapter.config, PromptMethod):
        prompts.install(state, adapter, structure)
    for name, layer in adapter.every_layer().items():
        carrier = base_layers.carrier(modules[name])
        if not is_adapted(carrier):
            adapt(carrier, state.active, _class_of(layer))
        layer.active = state.active
        put(layer, adapter.name)
        held.hold(layer)
    state.adapters[adapter.name] = adapter
    state.active.names[adapter.name] = adapter.number
    state.active.follow(adapter.name, adapter.parameters())
    if isinstance(adapter.config, PromptMethod) and adapter.config.where != "attention":
        state.active.marked.add(adapter.name)
    state.active.forget_calls()
    state.guard(adapter)
    if adapter.config.freeze_batch_norm:
        statistics.freeze(statistics.with_statistics(root).values())
    follow(adapter)
    if follows(adapter):
        next(iter(adapter.layers.values())).watch = Watch(adapter.name)
    carriers = [base_layers.carrier(modules[name]) for name in adapter.every_layer()]
    state.fast_paths.switch_off(structure.modules.values(), carriers)
    state.uncalled.add(adapter)
    state.wiring.note(state)
