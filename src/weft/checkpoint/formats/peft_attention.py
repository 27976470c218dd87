"""LoRA on nn.MultiheadAttention in peft's format, and other weights that a module reads itself.

peft has one layer for the two weights of an attention, with one rank and one alpha:

    <attention>.lora_A.weight [r, in], lora_B.weight                        in_proj_weight
    <attention>.base_layer.out_proj.lora_A.weight, lora_B.weight            out_proj

Its forward (0.21 and all versions before) adds the update of out_proj twice, so its B is written as
half of ours and read as twice peft's: both libraries compute the same. peft drops nothing there,
whatever lora_dropout says. It has no form for separate q, k and v weights, for one of the two
weights alone, nor for DoRA on them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from ... import methods
from ...errors import UnsupportedError
from ...methods import DoRA
from ...model.base_layers.held import KIND
from ..checkpoint import Checkpoint, CheckpointLayer

_IN, _OUT, _NESTED = ".in_proj_weight", ".out_proj", ".base_layer.out_proj"
_KNOWN = (0, 21)  # the last version of which it is known that it adds the update twice


def module_in_peft(module: str, kind: str | None) -> str:
    """Returns peft's name for a layer of ours."""
    if kind != KIND:
        return module
    if module.endswith(_OUT):
        return module.removesuffix(_OUT) + _NESTED
    return module.removesuffix(_IN)


def named_in_peft(module: str) -> str:
    """Returns the module that peft's patterns mean for one of the file: both weights of an
    attention go by its name.
    """
    return module.removesuffix(_NESTED)


def target_of(module: str, kind: str | None) -> str:
    """Returns the module that target_modules has to name for a layer of ours."""
    return named_in_peft(module_in_peft(module, kind))


def why_not(checkpoint: Checkpoint, model: nn.Module | None) -> str | None:
    """Returns why peft has no form for the weights of a checkpoint that modules read themselves."""
    held = {name: layer for name, layer in checkpoint.sites.items() if layer.kind == KIND}
    modules = {} if model is None or not held else dict(model.named_modules())
    for name, layer in held.items():
        pair = [name.removesuffix(_IN).removesuffix(_OUT) + end for end in (_IN, _OUT)]
        module = modules.get(target_of(name, KIND))
        if name not in pair or not isinstance(module, nn.MultiheadAttention | None):
            return f"peft has no form for {name!r}, which its module reads itself"
        if isinstance(layer.rule, DoRA):
            return f"peft has no DoRA on the attention of {name!r}"
        other = held.get(pair[name == pair[0]])
        same = other is not None and (other.rule.r, other.rule.scale, other.rule.init) == (
            layer.rule.r,
            layer.rule.scale,
            layer.rule.init,
        )
        if not same:
            return (
                f"peft adapts the two weights of {target_of(name, KIND)!r} together, with one rank and "
                f"one alpha, and {name!r} has no such companion"
            )
    return None


def halved(checkpoint: Checkpoint) -> Checkpoint:
    """Returns the checkpoint as it is written, with B of every out_proj halved."""
    sites = {
        name: replace(layer, tensors=_times(layer, 0.5)) if _doubled(name, layer) else layer
        for name, layer in checkpoint.sites.items()
    }
    return replace(checkpoint, sites=sites)


def restored(checkpoint: Checkpoint) -> None:
    """Undoes `halved` in a checkpoint that has been read."""
    for name, layer in checkpoint.sites.items():
        if _doubled(name, layer):
            layer.tensors = _times(layer, 2.0)


def read(checkpoint: Checkpoint, config: Mapping[str, Any]) -> None:
    """Gives the layers of attentions in a file of peft our names, and B of out_proj its value.

    Raises UnsupportedError if the file is of a version of peft whose forward is not known.
    """
    outs = [name for name in checkpoint.sites if name.endswith(_NESTED)]
    if outs and _version(config) > _KNOWN:
        raise UnsupportedError(
            f"{outs[0]!r}: it is not known whether peft {config['peft_version']} still adds the update "
            "of an attention's out_proj twice. Merge the adapter in peft."
        )
    renamed: dict[str, CheckpointLayer] = {}
    for name, layer in checkpoint.sites.items():
        attention = name.removesuffix(_NESTED)
        if name not in outs and f"{name}{_NESTED}" not in outs:
            renamed[name] = layer
            continue
        end = _OUT if name in outs else _IN
        rule = methods.replace(layer.rule, {"dropout": 0.0})
        renamed[attention + end] = replace(layer, rule=rule, kind=KIND)
    checkpoint.sites = renamed
    restored(checkpoint)
    if outs:
        checkpoint.notes.append(
            f"the update of {len(outs)} out_proj of attentions is twice what the file's tensors say, as "
            "in peft's forward"
        )


def _doubled(name: str, layer: CheckpointLayer) -> bool:
    return layer.kind == KIND and name.endswith(_OUT)


def _times(layer: CheckpointLayer, factor: float) -> dict[str, Any]:
    return {n: t * factor if n == "B" else t for n, t in layer.tensors.items()}


def _version(config: Mapping[str, Any]) -> tuple[int, ...]:
    match = re.match(r"(\d+)\.(\d+)", str(config.get("peft_version") or "0.0"))
    return tuple(map(int, match.groups())) if match else (0, 0)
