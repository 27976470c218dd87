"""LoRA that starts at a part of W (init="pissa", "olora") in peft's format: a plain LoRA of rank
2r.

    lora_A [2r, in] = A above A0      lora_B [out, 2r] = B beside -B0      s B A - s B0 A0 = s lora_B lora_A

That is what peft converts such an adapter to (`path_initial_model_for_weight_conversion`), and it
belongs to the unchanged base. Weft's header has the method's own configuration, so Weft reads all
four tensors back.

A file that peft saved without that conversion has A and B only, and its field init_lora_weights
makes peft take A0 and B0 from the base again when it loads the file. Weft does the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from ...errors import UnsupportedError
from ...methods.starts import OF_WEIGHT
from ..checkpoint import Checkpoint, CheckpointLayer


def plain(checkpoint: Checkpoint) -> Checkpoint:
    """Returns the checkpoint with every such layer as a plain LoRA, for writing."""
    sites = {
        module: _joined(layer) if layer.rule.starts_at_weight else layer
        for module, layer in checkpoint.sites.items()
    }
    config = checkpoint.config
    plain_config = _plain_method(config) if config.starts_at_weight else config
    return replace(checkpoint, config=plain_config, sites=sites)


def plain_layers(checkpoint: Checkpoint) -> dict[str, Any]:
    """Gives the layers of a checkpoint without tensors the methods of the file, for reading.
    Returns their own methods, for `split`.
    """
    own = {module: layer.rule for module, layer in checkpoint.sites.items()}
    for layer in checkpoint.sites.values():
        if layer.rule.starts_at_weight:
            layer.rule = _plain_method(layer.rule)
    return own


def split(checkpoint: Checkpoint, own: Mapping[str, Any]) -> None:
    """Undoes `plain_layers`, and divides the tensors lora_A [2r, in] and lora_B [out, 2r] that were
    read.
    """
    for module, layer in checkpoint.sites.items():
        layer.rule = own[module]
        if not layer.rule.starts_at_weight:
            continue
        for name, sign, dim in (("A", 1, -2), ("B", -1, -1)):
            layer.keys[f"{name}0"] = layer.keys[name]
            if name in layer.tensors:
                first, second = layer.tensors[name].chunk(2, dim)
                layer.tensors[name] = first.contiguous()
                layer.tensors[f"{name}0"] = sign * second.contiguous()


def init_of(config: Mapping[str, Any]) -> str | None:
    """Returns the `init` that peft's init_lora_weights names, if it is one of these, or None.

    Raises UnsupportedError for "olora" on layers that store [in, out]: there peft takes the factors
    of the other side of the weight, so that its adapter and its base do not belong together.
    """
    field = config.get("init_lora_weights")
    if not isinstance(field, str) or field not in OF_WEIGHT:
        return None
    if field == "olora" and config.get("fan_in_fan_out"):
        raise UnsupportedError(
            "init_lora_weights='olora' with fan_in_fan_out (Conv1D): peft decomposes the transposed "
            "weight there and takes it from the other, so the file does not start at its base. Merge "
            "it in peft."
        )
    return field


def _joined(layer: CheckpointLayer) -> CheckpointLayer:
    t = dict(layer.tensors)
    A0, B0 = t.pop("A0"), t.pop("B0")
    t |= {"A": torch.cat([t["A"], A0], dim=-2), "B": torch.cat([t["B"], -B0], dim=-1)}
    return replace(layer, rule=_plain_method(layer.rule), tensors=t)


def _plain_method(method: Any) -> Any:
    """The configuration of rank 2r with the same scale."""
    alpha = method.r if method.alpha is None else method.alpha
    factor = math.sqrt(2) if method.rslora else 2
    return replace(method, r=2 * method.r, alpha=float(alpha * factor), init="kaiming")
