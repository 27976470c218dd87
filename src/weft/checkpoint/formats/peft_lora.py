"""LoRA and DoRA in peft's format.

base_model.model.<module>.lora_A.weight [r, in]      lora_B.weight [out, r]      lora_magnitude_vector [out]
on an embedding: lora_embedding_A [r, num], lora_embedding_B [dim, r]; on a convolution kernels
(peft_convolutions.py)
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from ...errors import UnsupportedError
from ...methods import DoRA, LoRA, replace
from ...methods.config import scaling
from ..checkpoint import Checkpoint, CheckpointLayer, Written
from . import peft_attention as attention
from . import peft_bias as bias
from . import peft_convolutions as convolutions
from . import peft_experts as experts
from . import peft_layers as layers
from . import peft_starts as starts
from . import peft_tokens
from .peft_patterns import FirstFit

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
# Initialisations that leave the base as it was. Of those that rewrite it, "pissa" and "olora" can be
# done again (peft_starts.py); with the others the tensors belong to a base that no one has.
PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
_PATTERNS = {"r": "rank_pattern", "alpha": "alpha_pattern"}
SUPPORTED = {
    "bias": str | None,
    "r": int,
    "lora_alpha": float,
    "lora_dropout": float | None,
    "use_rslora": bool | None,
    "use_dora": bool | None,
    "rank_pattern": Mapping[str, int] | None,
    "alpha_pattern": Mapping[str, float] | None,
    "init_lora_weights": bool | str | None,
    peft_tokens.FIELD: Any,
    experts.FIELD: list[str] | None,
    # in every file; they act through fields that are refused
    "eva_config": Any,
    "ensure_weight_tying": Any,
    "megatron_core": Any,
    "qalora_group_size": Any,
}


class LoraFormat:
    """See the module's text."""

    name = "LORA"
    methods = (LoRA, DoRA)
    peft_reads_it = True
    stores_projections = False

    def why_not(self, checkpoint: Checkpoint, model: nn.Module | None = None) -> str | None:
        plain = not isinstance(checkpoint.config, DoRA)
        why = experts.why_not(checkpoint, plain) or experts.misread(checkpoint, model)
        why = why or convolutions.why_not(checkpoint) or attention.why_not(checkpoint, model)
        return why or bias.why_no_field(checkpoint, model)

    def write(self, checkpoint: Checkpoint, model: nn.Module | None = None) -> Written:
        written = attention.halved(starts.plain(checkpoint))
        packed = experts.packed(written)
        fields = {**_lora_fields(written), **experts.fields(written)}
        return layers.write_layers(packed, model, _key_in(packed), fields, convolutions.in_file)

    def recognises(self, config: Mapping[str, Any]) -> bool:
        return config.get("peft_type") == self.name

    def read(self, config: Mapping[str, Any], tensors: dict[str, Tensor]) -> Checkpoint:
        """Reads A [r, in], B [out, r] and, for DoRA, m [out] of every layer.

        Raises UnsupportedError if a field of peft is not supported, and ConfigError if a value is
        invalid.
        """
        layers.refuse_fields(config, SUPPORTED, "LoRA")
        init = config.get("init_lora_weights")
        of_weight = starts.init_of(config)
        if init not in PLAIN_INITS and of_weight is None:
            layers.refuse_fields({"init_lora_weights": init}, {}, "LoRA")
        method = DoRA if config.get("use_dora") else LoRA
        built = method(
            r=config.get("r", 8),
            alpha=float(config.get("lora_alpha", 8)),
            dropout=float(config.get("lora_dropout") or 0.0),
            init=of_weight or ("gaussian" if init == "gaussian" else "kaiming"),
            rslora=bool(config.get("use_rslora")),
            targets=layers.targets_of(config),
            modules_to_save=config.get("modules_to_save") or (),
            dtype=layers.dtype_of(tensors),
        )
        checkpoint = Checkpoint(built, "peft", self.name)
        rest = layers.bare_keys(checkpoint, tensors)
        kernels = convolutions.flattened(rest, _parts_of(rest))
        if kernels and built.starts_at_weight:
            raise UnsupportedError(
                f"init_lora_weights={init!r} on the convolution {next(iter(kernels))!r}: peft has no such "
                "start there, so it is not known what the file changes. Merge it in peft."
            )

        fits = {field: FirstFit(config, pattern) for field, pattern in _PATTERNS.items()}

        def layer_of(module: str, part: str) -> CheckpointLayer:
            named = attention.named_in_peft(module)
            own = {field: fit.value(named) for field, fit in fits.items()}
            changed = {field: value for field, value in own.items() if value is not None}
            if module in kernels:
                rule = replace(built, changed)
                return CheckpointLayer(rule, kind="convolution", geometry=kernels[module])
            if "embedding" not in part:
                return CheckpointLayer(replace(built, changed), kind="linear")
            if built.starts_at_weight:  # peft starts an embedding as usual whatever the field says
                changed["init"] = "kaiming"
            return CheckpointLayer(replace(built, changed), kind="embedding")

        def rule_of(name: str) -> Any:
            return layer_of(name, "lora_A").rule

        experts.read(checkpoint, rest, config, rule_of, layers.PREFIX)
        layers.read_layers(checkpoint, rest, _KEY, _PARTS, _lora_key, layer_of)
        attention.read(checkpoint, config)
        checkpoint = layers.finish_reading(checkpoint, rest, config, sorted(tensors)[:3])
        return bias.with_train(checkpoint)

    def restore(
        self, checkpoint: Checkpoint, tensors: dict[str, Tensor], manifest: Mapping[str, Any]
    ) -> None:
        """Fills A [r, in], B [out, r] and, for DoRA, m [out] of every layer."""
        own = starts.plain_layers(checkpoint)
        kernels = [m for m, layer in checkpoint.sites.items() if layer.geometry is not None]
        keys = {layers.PREFIX + _lora_key(m, t, None): (m, t) for m in kernels for t in _LINEAR}
        convolutions.flattened(tensors, {k: v for k, v in keys.items() if k in tensors})
        taken = experts.restore(checkpoint, tensors, layers.PREFIX)
        layers.restore_layers(checkpoint, tensors, manifest, _lora_key, taken)
        attention.restored(checkpoint)
        starts.split(checkpoint, own)

    def why_not_model(self, root: nn.Module) -> str | None:
        return None


def _parts_of(names: Collection[str]) -> dict[str, tuple[str, str]]:
    """The module and tensor (A, B or m) of every key of a layer that is no embedding."""
    found = {name: match for name in names if (match := _KEY.fullmatch(name))}
    return {
        name: (match["module"], _PARTS[match["part"]])
        for name, match in found.items()
        if "embedding" not in match["part"]
    }


def _key_in(checkpoint: Checkpoint) -> layers.KeyOf:
    def key(module: str, tensor: str, kind: str | None) -> str:
        if experts.is_stack(checkpoint.sites[module]):
            return experts.key_of(checkpoint, module, tensor)
        return _lora_key(module, tensor, kind)

    return key


def _lora_key(module: str, tensor: str, kind: str | None) -> str:
    names = _EMBEDDING if kind == "embedding" else _LINEAR
    return f"{attention.module_in_peft(module, kind)}.{names[tensor]}"


def _lora_fields(checkpoint: Checkpoint) -> dict[str, Any]:
    config: Any = checkpoint.config
    ranks, alphas = {}, {}
    alpha = _int_if_whole(config.r if config.alpha is None else config.alpha)
    for module, layer in checkpoint.sites.items():
        method = layer.rule
        if method.r != config.r:
            ranks[f"^{re.escape(attention.target_of(module, layer.kind))}"] = method.r
        if _alpha(method, config.rslora) != alpha:
            alphas[f"^{re.escape(attention.target_of(module, layer.kind))}"] = _alpha(
                method, config.rslora
            )
    return {
        "peft_type": LoraFormat.name,
        "r": config.r,
        "lora_alpha": alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.rslora,
        "use_dora": isinstance(config, DoRA),
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "init_lora_weights": "gaussian" if config.init == "gaussian" else True,
    }


def _alpha(method: LoRA, rslora: bool) -> float:
    """The alpha that gives a layer its scale, since all layers share peft's one use_rslora."""
    if method.rslora == rslora:
        return _int_if_whole(method.r if method.alpha is None else method.alpha)
    return _int_if_whole(
        scaling(method.r, method.alpha, method.rslora)
        * (math.sqrt(method.r) if rslora else method.r)
    )


def _int_if_whole(value: float) -> float:
    return int(value) if value == int(value) else float(value)
