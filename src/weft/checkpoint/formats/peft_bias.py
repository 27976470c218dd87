"""Biases of the base that peft trains beside LoRA, both ways.

bias="all"         every tensor named "bias", those of norms and of the head too
bias="lora_only"   the biases of the adapted layers

peft keeps an adapted layer's bias under <module>.base_layer.bias, and others under their own names.
With bias="all" it also writes <module>.original_module.bias and <module>.modules_to_save.bias of
modules_to_save, which repeat the base's and the trained bias.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ...model.carried import CHILD
from ...model.structure import canonical
from ..checkpoint import Checkpoint
from ..matching import owner_of

_BASE_LAYER, _ORIGINAL, _SAVED = ".base_layer.", ".original_module.", ".modules_to_save."
MODES = {"none": "none", "all": "all", "lora_only": "targets"}  # peft's -> Checkpoint.biases


def beside(checkpoint: Checkpoint) -> list[str]:
    """Returns the trained base tensors that belong to no module of modules_to_save."""
    config: Any = checkpoint.config
    names = [*checkpoint.selected, *checkpoint.aliases]
    return [name for name in names if owner_of(name, config.modules_to_save) is None]


def bias_field(checkpoint: Checkpoint) -> str | None:
    """Returns the value of peft's `bias` for this checkpoint, or None if peft has none."""
    names = beside(checkpoint)
    if not names:
        return "none"
    if not all(_is_bias(name) for name in names):
        return None
    config: Any = checkpoint.config
    if "biases" in config.train:
        return "all"
    return "lora_only" if all(_module(name) in checkpoint.sites for name in names) else "all"


def with_train(checkpoint: Checkpoint) -> Checkpoint:
    """Returns the checkpoint with the biases that it has in its configuration's `train`.

    The load plan names tensors in which "biases" and peft's "all" differ, which depends on the
    model.
    """
    words = {"none": (), "all": ("biases",), "targets": ("target-biases",)}[checkpoint.biases]
    trained = words if beside(checkpoint) else ()
    return replace(checkpoint, config=replace(checkpoint.config, train=trained))


def why_no_field(checkpoint: Checkpoint, model: nn.Module | None) -> str | None:
    """Returns why peft's `bias` cannot say which base tensors are trained, or None."""
    config: Any = checkpoint.config
    names = beside(checkpoint)
    other = next((name for name in names if not _is_bias(name)), None)
    if other is not None:
        return (
            f"peft trains all biases or those of the adapted layers, and no other base tensors "
            f"like {other!r}"
        )
    if not names or {"biases", "target-biases"} & set(config.train):
        return None
    some = f"peft trains all biases or those of the adapted layers, and not these: {names[:4]}"
    if model is None:  # only a file that peft reads is known to have all
        return None if checkpoint.peft_reads_it else some
    every = {
        name
        for name in map(canonical, dict(model.named_parameters(remove_duplicate=False)))
        if _is_bias(name)
        and CHILD not in name.split(".")
        and owner_of(name, config.modules_to_save) is None
    }
    targets = {name for name in every if _module(name) in checkpoint.sites}
    if set(names) in (every, targets):
        return None
    return some


def why_none(checkpoint: Checkpoint) -> str | None:
    """Returns why a format without trained biases cannot hold the checkpoint, or None."""
    other = next(iter(beside(checkpoint)), None)
    return None if other is None else f"there is no form for the base tensor {other!r}"


def key_of(checkpoint: Checkpoint, name: str) -> str:
    """Returns the key, without prefix, of a base tensor that is trained as a copy."""
    config: Any = checkpoint.config
    module = _module(name)
    if module in checkpoint.sites and owner_of(name, config.modules_to_save) is None:
        return f"{module}{_BASE_LAYER}{name.rpartition('.')[2]}".lstrip(".")
    return name


def take_biases(checkpoint: Checkpoint, rest: dict[str, Tensor], field: Any) -> None:
    """Moves the biases [out] that peft trained out of `rest`, as its field `bias` demands.

    Biases of modules_to_save remain there. Raises ConfigError if the value is not one of peft's.
    """
    if not isinstance(field, str) or field not in MODES:
        raise ConfigError(f"bias={field!r}: peft has {list(MODES)}.")
    checkpoint.biases = MODES[field]
    if checkpoint.biases == "none":
        return
    config: Any = checkpoint.config
    for name in [name for name in rest if _is_bias(name)]:
        trained = name.replace(_ORIGINAL, ".").replace(_SAVED, ".")
        if trained != name:
            if trained in rest and (_ORIGINAL in name or torch.equal(rest[trained], rest[name])):
                del rest[name]
            continue
        plain = f".{name}".replace(_BASE_LAYER, ".").removeprefix(".")
        adapted = _module(plain) in checkpoint.sites
        if owner_of(plain, config.modules_to_save) is None and (
            adapted or checkpoint.biases == "all"
        ):
            checkpoint.selected[plain] = rest.pop(name)


def _is_bias(name: str) -> bool:
    return name == "bias" or name.endswith(".bias")


def _module(name: str) -> str:
    return name.rpartition(".")[0]
