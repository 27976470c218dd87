"""The list of methods. A new method is a file in this folder and a line here."""

from __future__ import annotations

from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from ..errors import ConfigError
from . import token_spec
from .adalora import AdaLoRA
from .base import BranchMethod, LowRankMethod, PromptMethod
from .bottleneck import Bottleneck
from .config import CHOOSING, Config, LayerConfig, TensorConfig
from .dora import DoRA
from .dvora import DVoRA
from .dylora import DyLoRA
from .lora import LoRA
from .lora_fa import LoRAFA
from .prefix import PreEmbed, Prefix, PreLayer
from .selective import BitFit, Full, Head, TopLayers
from .target_spec import patterns
from .vera import VeRA

METHODS: dict[str, type[Any]] = {
    method.__name__: method
    for method in (
        Full,
        Head,
        BitFit,
        LoRA,
        VeRA,
        DoRA,
        DVoRA,
        TopLayers,
        Bottleneck,
        LoRAFA,
        AdaLoRA,
        DyLoRA,
        Prefix,
        PreEmbed,
        PreLayer,
    )
}

# Fields that the first version did not have. A file has them only if they are set.
LATER = ("train", "freeze_batch_norm", "new_tokens", "exclude", "within", "layers")


def by_name(name: str) -> type[Any]:
    """Returns the configuration class of a method, by its name in any case. Raises ConfigError with
    the nearest names.
    """
    folded = {known.lower(): known for known in METHODS}
    if name.lower() in folded:
        return METHODS[folded[name.lower()]]
    near = [folded[n] for n in get_close_matches(name.lower(), folded, n=2)] or list(METHODS)
    raise ConfigError(f"method {name!r} is not known. Nearest: {near}.")


def replace(config: Any, overrides: dict[str, Any]) -> Any:
    """Returns a configuration with some fields changed for one layer. Raises ConfigError for an
    unknown field.
    """
    if not overrides:
        return config
    values = {f.name: getattr(config, f.name) for f in fields(config)}
    known = set(values) - {*CHOOSING, *config.model_fields}
    for field in overrides:
        if field not in known:
            near = get_close_matches(field, known, n=2) or sorted(known)
            raise ConfigError(
                f"targets: {type(config).__name__} has no field {field!r} to override per layer. "
                f"Nearest: {near}."
            )
    return type(config)(**{**values, **overrides})


def to_json(config: Any) -> dict[str, Any]:
    """Returns the configuration as plain JSON values, with its name under "method"."""
    from .target_spec import to_plain

    values = {f.name: getattr(config, f.name) for f in fields(config)}
    if "targets" in values:
        values["targets"] = to_plain(values["targets"])
    values["new_tokens"] = token_spec.to_plain(values["new_tokens"])
    for added in LATER:  # so that versions without the field read the file
        if not values.get(added, True):
            del values[added]
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
    return {"method": type(config).__name__, **plain}


def from_json(data: Any) -> Any:
    """Returns the configuration that `to_json` wrote.

    Raises ConfigError, which names the field or method, if one of them is unknown, or if a field of
    a layer is overridden wrongly.
    """
    if not isinstance(data, dict) or not isinstance(data.get("method"), str):
        raise ConfigError(
            'a configuration in JSON is an object with a "method" field, for example {"method": '
            '"LoRA"}.'
        )
    cls = by_name(data["method"])
    known = {f.name for f in fields(cls)}
    for field in data:
        if field != "method" and field not in known:
            near = get_close_matches(field, known, n=2) or sorted(known)
            raise ConfigError(f"{cls.__name__} has no field {field!r}. Nearest: {near}.")
    config = cls(**{k: v for k, v in data.items() if k != "method"})
    if isinstance(config, LayerConfig):
        for _, overrides in patterns(config.targets):
            replace(config, overrides)
    return config


__all__ = [
    "METHODS",
    "BranchMethod",
    "Config",
    "LayerConfig",
    "LowRankMethod",
    "TensorConfig",
    "PromptMethod",
    "by_name",
    "from_json",
    "replace",
    "to_json",
    "LoRA",
    "VeRA",
    "DoRA",
    "DVoRA",
    "LoRAFA",
    "AdaLoRA",
    "DyLoRA",
    "Bottleneck",
    "Prefix",
    "PreEmbed",
    "PreLayer",
    "Full",
    "Head",
    "BitFit",
    "TopLayers",
]
