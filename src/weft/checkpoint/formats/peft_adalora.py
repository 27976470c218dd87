"""AdaLoRA in peft's format.

base_model.model.<module>.lora_B [out, r] is P      lora_E [r, 1] is lam      lora_A [r, in] is Q

peft may leave pruned triplets out of a file and record in `rank_pattern` which they were; their
vectors are then lost, and zeros replace them. Weft writes all triplets, since they can return; its
header records which are in force. peft divides alpha by r + 1e-5, Weft by r; lora_alpha in the
file, and alpha on reading, are those that give the same scale.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ...methods import AdaLoRA
from ...methods.field_types import hints_of
from ..checkpoint import Checkpoint, CheckpointLayer, Written
from ..drawn import MOST_DRAWN
from . import peft_bias as bias
from . import peft_convolutions as convolutions
from . import peft_layers as layers
from . import peft_tokens

_NAMES = {"P": "lora_B", "lam": "lora_E", "Q": "lora_A"}
_PARTS = {name: tensor for tensor, name in _NAMES.items()}
_key_of = layers.keys_of(_NAMES)
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
_DIMS = (2,)  # of convolutions, whose lora_A is [r, in · k]
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
_SUPPORTED: Mapping[str, Any] = {
    **dict.fromkeys(_UNREAD, Any),
    **{theirs: hints_of(AdaLoRA)[ours] | None for ours, theirs in _FIELDS.items()},
    "lora_alpha": float,
    "rank_pattern": Mapping[str, list[bool]] | None,
    "init_lora_weights": Any,
    peft_tokens.FIELD: Any,
}


class AdaLoraFormat:
    """See the module's text."""

    name = "ADALORA"
    methods = (AdaLoRA,)
    peft_reads_it = True
    stores_projections = False

    def why_not(self, checkpoint: Checkpoint, model: nn.Module | None = None) -> str | None:
        config: Any = checkpoint.config
        for name, layer in checkpoint.sites.items():
            if layer.kind == "embedding":
                return f"peft has no form for the embedding {name!r}"
            if layer.kind == "weight":
                return f"peft has no form for {name!r}, which its module reads itself"
            if (layer.rule.r, layer.rule.scale) != (config.r, config.scale):
                return f"peft has one rank and one alpha for all layers, and {name!r} has others"
        return convolutions.why_not(checkpoint, _DIMS) or bias.why_none(checkpoint)

    def write(self, checkpoint: Checkpoint, model: nn.Module | None = None) -> Written:
        return layers.write_layers(checkpoint, model, _key_of, _adalora_fields(checkpoint.config))

    def recognises(self, config: Mapping[str, Any]) -> bool:
        return config.get("peft_type") == self.name

    def read(self, config: Mapping[str, Any], tensors: dict[str, Tensor]) -> Checkpoint:
        """Reads P [out, r], lam [r, 1] and Q [r, in] of every layer; pruned triplets are zeros.

        Raises UnsupportedError if a field of peft is not supported, and ConfigError if a value is
        invalid.
        """
        layers.refuse_fields(config, _SUPPORTED, "AdaLoRA")
        built = _parse_config(config, tensors)
        checkpoint = Checkpoint(built, "peft", self.name)
        rest = layers.bare_keys(checkpoint, tensors)
        patterns = _patterns(config, built.r)
        for name, t in rest.items():
            match = _KEY.fullmatch(name)
            if match and match["module"] in patterns:
                dim = 1 if _PARTS[match["part"]] == "P" else 0
                rest[name] = _grown(t, patterns[match["module"]], dim)

        def layer_of(module: str, part: str) -> CheckpointLayer:
            return CheckpointLayer(built, reached=patterns.get(module))

        layers.read_layers(checkpoint, rest, _KEY, _PARTS, _key_of, layer_of)
        if patterns:
            checkpoint.notes.append(
                "peft has left the vectors of pruned triplets out of the file; they are 0 and "
                "cannot return"
            )
        return layers.finish_reading(checkpoint, rest, config, sorted(tensors)[:3])

    def restore(
        self, checkpoint: Checkpoint, tensors: dict[str, Tensor], manifest: Mapping[str, Any]
    ) -> None:
        """Fills P [out, r], lam [r, 1] and Q [r, in] of every layer."""
        layers.restore_layers(checkpoint, tensors, manifest, _key_of)

    def why_not_model(self, root: nn.Module) -> str | None:
        return None


def _adalora_fields(config: AdaLoRA) -> dict[str, Any]:
    """The method's fields; peft wants a schedule even if nothing trains any more."""
    total = config.total_steps
    warm_up, final = config.phases if total else (0, 0)
    return {
        "peft_type": AdaLoraFormat.name,
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


def _parse_config(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> AdaLoRA:
    given = {
        ours: config[theirs] for ours, theirs in _FIELDS.items() if config.get(theirs) is not None
    }
    r, alpha = given.get("r", 12), config.get("lora_alpha", 8)
    target_r = min(given.get("target_r", 8), r)
    return AdaLoRA(
        **{"r": r, "warm_up": 0, "final": 0, **given, "target_r": target_r},
        alpha=float(f"{(alpha if alpha > 0 else r) * r / (r + _OFFSET):.14g}"),
        targets=layers.targets_of(config),
        modules_to_save=config.get("modules_to_save") or (),
        dtype=layers.dtype_of(tensors),
    )


def _patterns(config: Mapping[str, Any], r: int) -> dict[str, str]:
    """Module -> one mark per triplet, "1" if peft kept it. The keys name the module's lora_E."""
    given = config.get("rank_pattern") or {}
    found = {}
    for name, marks in given.items():
        match = _KEY.fullmatch(name)
        if match is None or len(marks) != r:
            raise ConfigError(
                f"rank_pattern: {name!r} must name a lora_E and have {r} marks, one per triplet."
            )
        found[match["module"]] = "".join("01"[mark] for mark in marks)
    return found


def _grown(t: Tensor, pattern: str, dim: int) -> Tensor:
    """The tensor with zeros for the triplets that were left out; unchanged if it does not fit."""
    kept = [i for i, mark in enumerate(pattern) if mark == "1"]
    if t.ndim != 2 or t.shape[dim] != len(kept) or t.shape[1 - dim] * len(pattern) > MOST_DRAWN:
        return t
    shape = list(t.shape)
    shape[dim] = len(pattern)
    return t.new_zeros(shape).index_copy(dim, torch.tensor(kept, dtype=torch.int64), t)
