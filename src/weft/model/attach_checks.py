"""What `attach` checks before it changes the model: names, other owners, tied weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..errors import ConfigError, MergeError, TargetError, WeftError
from ..methods import stacked
from ..methods.base import LowRankMethod
from .base_layers import HeldWeight, Site, carrier, held_fault, holder, own_class
from .carried import CHILD, active_of, is_adapted
from .held import HELD
from .state import State
from .structure import Structure
from .wiring import memory_of

_NAME = re.compile(r"[A-Za-z0-9_-]+")


def check_name(state: State | None, name: str, taken: bool = False) -> None:
    """Raises ConfigError (no possible name), MergeError (an adapter is merged) or WeftError (the
    name is taken, or is not, if it has to be).
    """
    known: Any = name
    if not isinstance(known, str) or not _NAME.fullmatch(name) or hasattr(nn.ModuleDict(), name):
        raise ConfigError(
            f"adapter name {name!r}: use letters, digits, '_' and '-', and no attribute of "
            "nn.ModuleDict."
        )
    if state is None:
        return
    if state.merged is not None:
        raise MergeError(
            f"adapter {state.merged.name!r} is merged; call weft.unmerge(model) before attaching "
            "another."
        )
    if taken:
        state.adapter(name)
    elif name in state.adapters:
        raise WeftError(
            f"adapter {name!r} is already attached (have: {list(state.adapters)}). Choose another "
            f"name, or weft.detach(model, {name!r}) first. weft.load(..., replace=True) replaces it."
        )


def check_ownership(
    modules: Mapping[str, Site], configs: Mapping[str, Any], state: State | None
) -> None:
    """Raises WeftError for a layer that carries adapters of another root, and TargetError for a
    module that is not there or whose attributes are in the way.
    """
    mine = None if state is None else state.active
    for name, site in modules.items():
        module = carrier(site)
        if is_adapted(module) and active_of(module) is not mine:
            raise WeftError(
                f"{name!r} carries an adapter that was attached through another root module. Use "
                "that module, or detach it first."
            )
    for name in configs:
        if name not in modules:
            raise TargetError(f"the model has no module {name!r}.")
        module = carrier(modules[name])
        if not is_adapted(module) and hasattr(module, CHILD):
            raise TargetError(
                f"{name!r} has an attribute {CHILD!r} of its own, where Weft would keep its "
                "adapters."
            )


def check_fits(views: Mapping[str, Any], configs: Mapping[str, Any]) -> None:
    """Raises TargetError if a method cannot adapt a layer of its kind. `views`: the layers by name."""
    for name, method in configs.items():
        layer, cls = views[name], type(method).__name__
        module = own_class(layer.module).__name__
        if layer.is_convolution and not isinstance(method, LowRankMethod):
            raise TargetError(
                f"{name!r} is a convolution ({module}), and {cls} computes beside layers of vectors. Name "
                'other layers, or write exclude="conv".'
            )
        if not layer.has_weight and not method.adapts_norms:
            raise TargetError(
                f"{name!r} is a layer norm ({module}), and {cls} adapts weight matrices. "
                'Target "mlp-output", or another linear layer.'
            )
        why = None if layer.stack is None else stacked.why_not(method)
        if why is not None:
            raise TargetError(
                f"{name!r} holds {layer.stack} fused experts, and {why}. Leave them out with "
                'exclude=["experts"], or choose LoRA, DoRA, VeRA, DVoRA or LoRAFA.'
            )


def check_hosts(modules: Mapping[str, Site], configs: Mapping[str, Any]) -> None:
    """Raises TargetError for a method that cannot act on a weight which its module reads itself,
    and for a module that would have to carry such weights and a prompt.
    """
    for name, method in configs.items():
        site, kept = modules[name], carrier(modules[name])
        swapped = hasattr(type(kept), HELD)
        if isinstance(site, HeldWeight):
            why = held_fault(site, method)
            if why is not None:
                raise TargetError(f"{name!r}: {why}.")
        if is_adapted(kept) and swapped != isinstance(site, HeldWeight):
            raise TargetError(
                f"{name!r}: {own_class(kept).__name__} carries another adapter in a way that excludes "
                "this one (a prompt, or an adapted weight of its own). Detach that one first."
            )


def check_tied(structure: Structure, configs: Mapping[str, Any]) -> None:
    """Raises TargetError if a target is tied: merging would change the outputs of its other
    readers.
    """
    readers: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for name, module in structure.modules.items():
        for tensor, parameter in module._parameters.items():
            if parameter is not None:
                readers.setdefault(memory_of(parameter), []).append((name, module, tensor))
    for name in configs:
        layer, own = holder(structure.carriers[name], name)
        weight: Any = layer._parameters.get(own)
        tied = () if weight is None else readers[memory_of(weight)]
        for other, module, tensor in tied:
            if module is layer and tensor == own:
                continue
            full = f"{other}.{tensor}".lstrip(".")
            reader = other if other and tensor == "weight" else full
            raise TargetError(
                f"{name!r} and {reader!r} are tied: they read one weight, so adapting one side "
                f"would merge into both. Give {reader!r} its own copy first: model.{full} = torch.nn."
                f"Parameter(model.{full}.detach().clone()) and config.tie_word_embeddings = False."
            )
