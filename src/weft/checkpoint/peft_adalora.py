"""AdaLoRA in peft's layout, both ways.

base_model.model.<module>.lora_B [out, r] is P      lora_E [r, 1] is lam      lora_A [r, in] is Q

peft may leave pruned triplets out of a file and say in `rank_pattern` which they were; their
vectors are then gone, and zeros stand in for them. Weft writes them all, since they can return; the
choice reached is in its own header. peft divides alpha by r + 1e-5 where Weft divides by r; the
file's lora_alpha, and alpha on reading, are those that give the same scale, so that a deep model
does not blow the difference up.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from ..methods import AdaLoRA
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

PEFT_TYPE = "ADALORA"
_NAMES = {"P": "lora_B", "lam": "lora_E", "Q": "lora_A"}
_PARTS = {name: tensor for tensor, name in _NAMES.items()}
_KEY = re.compile(rf"(?P<module>.+)\.(?P<part>{'|'.join(_PARTS)})(\.(?!weight$|bias$)[^.]+)?")
_FIELDS = {
    "r": "init_r",
    "target_r": "target_r",
    "total_steps": "total_step",
    "warm_up": "tinit",
    "final": "tfinal",
    "interval": "deltaT",
    "beta1": "beta1",
    "beta2": "beta2",
    "orthogonality": "orth_reg_weight",
    "dropout": "lora_dropout",
}
_OFFSET = 1e-5
# Fields of peft's LoRA that its AdaLoRA has too and never reads.
_UNREAD = (
    "r",
    "use_rslora",
    "alpha_pattern",
    "eva_config",
    "ensure_weight_tying",
    "megatron_core",
    "qalora_group_size",
)
_CARRIED = (*_FIELDS.values(), *_UNREAD, "lora_alpha", "rank_pattern", "init_lora_weights")


def why_not(adapter: Adapter) -> str | None:
    """What peft's AdaLoRA has no form for in this adapter; None where it has one."""
    for name, site in adapter.layers.items():
        if site.base.kind == "embedding":
            return f"peft's AdaLoRA has no form for the embedding {name!r}"
        rule: Any = site.method
        if (rule.r, rule.scale) != (adapter.config.r, adapter.config.scale):
            return (
                f"peft's AdaLoRA has one rank and one alpha for all layers, and {name!r} has others"
            )
    return None


def write(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The layers' tensors by key, and adapter_config.json. The choice reached is in the header."""
    config = adapter.config
    tensors: dict[str, Tensor] = {}
    for name, site in adapter.layers.items():
        tensors |= {
            key(canonical(name), t, site.base.kind): value
            for t, value in trained_tensors(site).items()
        }
    return tensors, {**common_config(adapter), **fields(config)}


def fields(config: AdaLoRA) -> dict[str, Any]:
    """What adapter_config.json says of the method. peft wants a schedule even where nothing trains
    any more.
    """
    total = config.total_steps
    warm_up, final = config.phases if total else (0, 0)
    return {
        "peft_type": PEFT_TYPE,
        "init_r": config.r,
        "target_r": config.final_r,
        "total_step": total or 1,
        "tinit": warm_up,
        "tfinal": final,
        "deltaT": config.interval,
        "beta1": config.beta1,
        "beta2": config.beta2,
        "orth_reg_weight": config.orthogonality,
        "lora_alpha": config.scale * (config.r + _OFFSET),
        "lora_dropout": config.dropout,
    }


def key(module: str, tensor: str, kind: str | None) -> str:
    """The key of one tensor in the file."""
    return f"{PREFIX}{module}.{_NAMES[tensor]}"


def read(config: Mapping[str, Any], tensors: dict[str, Tensor]) -> tuple[Stored, dict[str, Tensor]]:
    """What peft saved, and the tensors that belong to no layer. Raises UnsupportedError for what
    cannot be carried.
    """
    refuse_fields(config, _CARRIED, "AdaLoRA")
    given = {
        ours: config[theirs] for ours, theirs in _FIELDS.items() if config.get(theirs) is not None
    }
    r, alpha = given.get("r", 12), config.get("lora_alpha", 8)
    stored = Stored(
        AdaLoRA(
            **{
                "r": r,
                "warm_up": 0,
                "final": 0,
                **given,
                "target_r": min(given.get("target_r", 8), r),
            },
            alpha=float(f"{(alpha if alpha > 0 else r) * r / (r + _OFFSET):.14g}"),
            targets=targets_of(config),
            modules_to_save=config.get("modules_to_save") or (),
            dtype=dtype_of(tensors),
        ),
        "peft",
    )
    rest = bare_keys(stored, tensors)
    patterns = _patterns(config, r)
    spelled: dict[str, dict[str, str]] = {}
    for name in list(rest):
        if match := _KEY.fullmatch(name):
            module, tensor = match["module"], _PARTS[match["part"]]
            spelled.setdefault(module, {})[tensor] = name
            stored.sites.setdefault(module, StoredSite(stored.config, reached=patterns.get(module)))
            if module in patterns:
                rest[name] = _grown(rest[name], patterns[module], 1 if tensor == "P" else 0)
    for module, found in spelled.items():
        usual = {t: key(module, t, None).removeprefix(PREFIX) for t in _NAMES}
        take_trained(stored, rest, module, {**usual, **found})
    if patterns:
        stored.notes.append(
            "peft has left the vectors of pruned triplets out of the file; they are 0 and cannot "
            "return"
        )
    fill_in(stored, config)
    return stored, rest


def _patterns(config: Mapping[str, Any], r: int) -> dict[str, str]:
    """Module -> "1" for each triplet that peft kept. Its keys end in "lora_E", and in the adapter's
    name perhaps.
    """
    given = config.get("rank_pattern") or {}
    if not isinstance(given, Mapping):
        raise ConfigError(
            f"rank_pattern={given!r}: an object of tensor names and lists is expected."
        )
    found = {}
    for name, marks in given.items():
        match = _KEY.fullmatch(name)
        if match is None or not isinstance(marks, list) or len(marks) != r:
            raise ConfigError(
                f"rank_pattern: {name!r} is to name a lora_E and hold {r} marks, one a triplet."
            )
        found[match["module"]] = "".join("01"[bool(mark)] for mark in marks)
    return found


def _grown(t: Tensor, pattern: str, dim: int) -> Tensor:
    """The tensor with zeros where a triplet was left out; as it is where none was, or where it does
    not fit at all.
    """
    places = [i for i, mark in enumerate(pattern) if mark == "1"]
    if t.ndim != 2 or t.shape[dim] != len(places):
        return t
    shape = list(t.shape)
    shape[dim] = len(pattern)
    return t.new_zeros(shape).index_copy(dim, torch.tensor(places, dtype=torch.int64), t)
