"""LoRA and DoRA in peft's layout, both ways.

base_model.model.<module>.lora_A.weight [r, in]      lora_B.weight [out, r]      lora_magnitude_vector [out]
on an embedding: lora_embedding_A [r, num], lora_embedding_B [dim, r]
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import ConfigError
from ..methods import DoRA, LoRA, replace
from ..model.adapter import Adapter
from ..model.structure import canonical
from .content import Stored, StoredSite
from .header import trained_tensors
from .peft_common import (
    PREFIX,
    bare_keys,
    common_config,
    dtype_of,
    fill_in,
    refuse_fields,
    take_trained,
    targets_of,
)

PEFT_TYPE = "LORA"
_LINEAR = {"A": "lora_A.weight", "B": "lora_B.weight", "m": "lora_magnitude_vector"}
_EMBEDDING = {"A": "lora_embedding_A", "B": "lora_embedding_B", "m": "lora_magnitude_vector"}
_PARTS = {
    "lora_A": "A",
    "lora_B": "B",
    "lora_embedding_A": "A",
    "lora_embedding_B": "B",
    "lora_magnitude_vector": "m",
}
_KEY = re.compile(
    rf"(?P<module>.+)\.(?P<part>{'|'.join(_PARTS)})"
    r"(\.(?!weight$|bias$)[^.]+)?(\.weight)?"
)  # a state_dict taken by hand has the adapter's name in it
# Starts that leave the base as it was; the others (pissa, olora, ...) rewrite it, so the tensors
# mean another base.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
_CARRIED = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "init_lora_weights",
    "eva_config",
    "ensure_weight_tying",
    "megatron_core",
    "qalora_group_size",
)  # set in every file; they act through fields that are refused


def write(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The layers' tensors by key, and adapter_config.json."""
    config = adapter.config
    tensors: dict[str, Tensor] = {}
    for name, site in adapter.layers.items():
        tensors |= {
            key(canonical(name), t, site.base.kind): value
            for t, value in trained_tensors(site).items()
        }
    rules = {canonical(name): site.method for name, site in adapter.layers.items()}
    return tensors, {**common_config(adapter), **fields(config, rules)}


def fields(config: Any, rules: Mapping[str, Any]) -> dict[str, Any]:
    """What adapter_config.json says of the method; `rules` are those of the layers by name."""
    ranks, alphas = {}, {}
    alpha = _number(config.r if config.alpha is None else config.alpha)
    for module, outer in rules.items():
        rule = inner(outer)
        if rule.r != config.r:
            ranks[f"^{re.escape(module)}"] = rule.r
        if _alpha(rule, config.rslora) != alpha:
            alphas[f"^{re.escape(module)}"] = _alpha(rule, config.rslora)
    return {
        "peft_type": PEFT_TYPE,
        "r": config.r,
        "lora_alpha": alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.rslora,
        "use_dora": isinstance(config, DoRA),
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "init_lora_weights": "gaussian" if config.init == "gaussian" else True,
    }


def key(module: str, tensor: str, kind: str | None) -> str:
    """The key of one tensor in the file."""
    names = _EMBEDDING if kind == "embedding" else _LINEAR
    return f"{PREFIX}{module}.{names[tensor]}"


def inner(rule: Any) -> LoRA:
    """The LoRA rule itself, or the one within DoRA."""
    found: LoRA = rule  # DoRA has all of its fields
    return found


def _alpha(rule: LoRA, rslora: bool) -> float:
    """The alpha that gives a layer its scale where all layers share peft's one use_rslora."""
    if rule.rslora == rslora:
        return _number(rule.r if rule.alpha is None else rule.alpha)
    return _number(rule.scale * (math.sqrt(rule.r) if rslora else rule.r))


def _number(value: float) -> float:
    return int(value) if value == int(value) else float(value)


def read(config: Mapping[str, Any], tensors: dict[str, Tensor]) -> tuple[Stored, dict[str, Tensor]]:
    """What peft saved, and the tensors that belong to no layer. Layers, ranks and scales come from
    keys and patterns.

    Raises UnsupportedError for a field that cannot be carried.
    """
    refuse_fields(config, _CARRIED, "LoRA")
    start = config.get("init_lora_weights")
    if start not in _PLAIN_STARTS:
        refuse_fields({"init_lora_weights": start}, (), "LoRA")
    method = DoRA if config.get("use_dora") else LoRA
    stored = Stored(
        method(
            r=config.get("r", 8),
            alpha=float(config.get("lora_alpha", 8)),
            dropout=float(config.get("lora_dropout") or 0.0),
            init="gaussian" if start == "gaussian" else "kaiming",
            rslora=bool(config.get("use_rslora")),
            targets=targets_of(config),
            modules_to_save=config.get("modules_to_save") or (),
            dtype=dtype_of(tensors),
        ),
        "peft",
    )
    rest = bare_keys(stored, tensors)
    spelled: dict[str, dict[str, str]] = {}
    for name in rest:
        if match := _KEY.fullmatch(name):
            spelled.setdefault(match["module"], {})[_PARTS[match["part"]]] = name
            site = stored.sites.setdefault(
                match["module"], StoredSite(_rule(stored.config, match["module"], config))
            )
            if "embedding" in match["part"]:
                site.kind = "embedding"
    for module, found in spelled.items():
        usual = {t: key(module, t, stored.sites[module].kind).removeprefix(PREFIX) for t in _LINEAR}
        take_trained(stored, rest, module, {**usual, **found})
    fill_in(stored, config)
    return stored, rest


def _rule(config: Any, module: str, peft: Mapping[str, Any]) -> Any:
    """The first pattern that fits a layer's name is the one that peft takes."""
    changed: dict[str, Any] = {}
    for field, pattern in (("r", "rank_pattern"), ("alpha", "alpha_pattern")):
        values = peft.get(pattern) or {}
        if not isinstance(values, Mapping):
            raise ConfigError(
                f"{pattern}={values!r}: an object of name patterns and numbers is expected."
            )
        fits = next((p for p in values if re.match(rf"(.*\.)?({p})$", module)), None)
        if fits is not None:
            changed[field] = values[fits] if field == "r" else float(values[fits])
    return replace(config, changed)
