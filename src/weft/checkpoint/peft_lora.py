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

from ..methods import DoRA, LoRA, replace
from ..model.adapter import Adapter
from .content import Stored, StoredSite, extra, take
from .peft_common import PREFIX, bare_keys, common_config, refuse_fields, rest_is_selected, selected_tensors

PEFT_TYPE = "LORA"
_LINEAR = {"A": "lora_A.weight", "B": "lora_B.weight", "m": "lora_magnitude_vector"}
_EMBEDDING = {"A": "lora_embedding_A", "B": "lora_embedding_B", "m": "lora_magnitude_vector"}
_KEY = re.compile(r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
                  r"(?P<adapter>\.(?!weight$)[^.]+)?(?P<weight>\.weight)?")
_CARRIED = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern",
            "init_lora_weights", "megatron_core", "qalora_group_size", "ensure_weight_tying")
# Starts that leave the base as it was; the others (pissa, olora, ...) rewrite it, so the tensors mean another base.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


def write(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by key, and adapter_config.json."""
    config = adapter.config
    tensors = {}
    for module, site in adapter.sites.items():
        names = _EMBEDDING if site.host.kind == "embedding" else _LINEAR
        tensors |= {f"{PREFIX}{module}.{names[t]}": p.detach() for t, p in site.trainable().items()}
    alpha = float(config.r if config.alpha is None else config.alpha)
    ranks = {f"^{re.escape(m)}": s.rule.r for m, s in adapter.sites.items() if s.rule.r != config.r}
    alphas = {f"^{re.escape(m)}": a for m, s in adapter.sites.items()
              if (a := _alpha(s.rule, config.rslora)) != alpha}
    return {**tensors, **selected_tensors(adapter)}, {
        **common_config(adapter), "peft_type": PEFT_TYPE, "r": config.r, "lora_alpha": alpha,
        "lora_dropout": config.dropout, "use_rslora": config.rslora, "use_dora": isinstance(config, DoRA),
        "rank_pattern": ranks, "alpha_pattern": alphas,
        "init_lora_weights": "gaussian" if config.init == "gaussian" else True}


def _alpha(rule: Any, rslora: bool) -> float:
    """The alpha that gives a layer its scale where all layers share peft's one use_rslora."""
    rule = getattr(rule, "inner", rule)
    if rule.rslora == rslora:
        return float(rule.r if rule.alpha is None else rule.alpha)
    return float(rule.scale * (math.sqrt(rule.r) if rslora else rule.r))


def read(config: Mapping[str, Any], tensors: dict[str, Tensor]) -> Stored:
    """What peft saved. Raises UnsupportedError for a field that cannot be carried."""
    refuse_fields(config, _CARRIED, "LoRA")
    start = config.get("init_lora_weights")
    if start not in _PLAIN_STARTS:
        refuse_fields({"init_lora_weights": start}, (), "LoRA")
    method = DoRA if config.get("use_dora") else LoRA
    stored = Stored(method(
        r=config.get("r", 8), alpha=float(config.get("lora_alpha", 8)), dropout=float(config.get("lora_dropout") or 0.0),
        init="gaussian" if start == "gaussian" else "kaiming", rslora=bool(config.get("use_rslora")),
        targets=config.get("target_modules") or "all-linear", modules_to_save=config.get("modules_to_save") or ()), "peft")
    stored.picks_layers = bool(config.get("layers_to_transform") or config.get("exclude_modules"))
    read_tensors(stored, bare_keys(tensors, stored.notes), config)
    return stored


def read_tensors(stored: Stored, tensors: dict[str, Tensor], config: Mapping[str, Any] | None = None) -> None:
    """Fill the sites from bare keys. With `config` (peft's), the sites and their ranks come from the keys and patterns."""
    parsed = {key: match for key in tensors if (match := _KEY.fullmatch(key))}
    if config is not None:
        for match in parsed.values():
            module = match["module"]
            kind = "embedding" if "embedding" in match["part"] else None
            if module not in stored.sites:
                stored.sites[module] = StoredSite(_rule(stored.config, module, config), {}, {}, kind)
            stored.sites[module].kind = stored.sites[module].kind or kind
    spelled = {(m["module"], m["part"]): key for key, m in parsed.items()}
    for module, site in stored.sites.items():
        names = _EMBEDDING if site.kind == "embedding" else _LINEAR
        for tensor, shape in site.rule.trained(*(site.shape or (1, 1))).items():
            part = names[tensor].removesuffix(".weight")
            key = spelled.get((module, part), f"{module}.{names[tensor]}")
            found = take(tensors, key, shape if site.shape else None, f"{tensor} of {module!r}", stored.problems)
            site.keys[tensor] = PREFIX + key
            if found is not None:
                site.tensors[tensor] = found
    rest_is_selected(stored, tensors, stored.config.modules_to_save)
    stored.problems += extra(tensors, [f"{m}.{n}" for m, s in stored.sites.items() for n in _LINEAR.values()])


def _rule(config: Any, module: str, peft: Mapping[str, Any]) -> Any:
    changed: dict[str, Any] = {}
    for field, pattern in (("r", "rank_pattern"), ("alpha", "alpha_pattern")):
        for key, value in (peft.get(pattern) or {}).items():
            if re.match(rf"(.*\.)?({key})$", module):
                changed[field] = value if field == "r" else float(value)
                break
    return replace(config, changed)
