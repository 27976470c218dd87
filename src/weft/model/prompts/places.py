"""Finds where prompt methods attach: self-attentions, the model's input, or blocks.

An encoder-decoder has its prefixes in both stacks. All conventions are those of transformers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from ...errors import TargetError
from ...methods.base import PromptMethod
from ..plan_entries import Frozen
from ..structure import Structure, base_modules
from ..structure.names import within
from . import attention
from .forward import code_names, parameters_of
from .injection import InjectionPoint, injection_point

_CROSS = re.compile(r"cross|encdec|encoder_att", re.IGNORECASE)
# Arguments by which a block receives positions.
_RELATIVE = {"position_embeddings", "position_bias", "relative_pos", "rel_embeddings"}
# Arguments of a module that reads an image or a sound, also beside a text.
_OTHER_INPUT = re.compile(r"pixel_|visual_|image_|input_features")
_KEY_MAPS = ("k_proj", "key", "k", "k_lin", "key_proj")
_VALUE_MAPS = ("v_proj", "value", "v", "v_lin", "value_proj")
_HEAD_WIDTH = ("head_dim", "attention_head_size", "key_value_proj_dim", "head_size")


@dataclass(frozen=True, eq=False)
class PromptHost:
    """The module that a prompt attaches to. `where` is "attention", "embeddings" or "block".

    `out_features` and `in_features` are the widths of keys and values for an attention; otherwise
    both are the width of the states.
    """

    module: nn.Module
    where: str
    out_features: int
    in_features: int

    takes_ids: ClassVar[bool] = False
    has_weight: ClassVar[bool] = True  # nothing reads it: prompts are no change of a weight
    transposed: ClassVar[bool] = False
    is_convolution: ClassVar[bool] = False
    packed_as: ClassVar[None] = None
    stack: ClassVar[int | None] = None
    tensor: ClassVar[str] = "weight"

    @property
    def kind(self) -> str:
        """The name of the kind in a plan and in files."""
        return self.where

    @property
    def device(self) -> torch.device:
        """The device of the module's parameters."""
        return next(p.device for p in self.module.parameters())

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.where == "attention":  # unpickled, perhaps in a process without our functions
            attention.register()


def find_places(structure: Structure, where: str) -> tuple[dict[str, PromptHost], list[Frozen]]:
    """Returns the hosts of a prompt by module name, and modules that could be one and are not.

    Raises TargetError, which says what the model would need, if there is no host.
    """
    if where == "attention":
        return _attentions(structure)
    point = injection_point(structure)
    if point is None:
        raise TargetError(
            f"{type(structure.root).__name__} has no module where virtual tokens could enter. "
            "Needed is a transformers model that takes inputs_embeds (GPT-2, Llama) or has a "
            "module `embeddings` (BERT, ViT) before its blocks, whose tokens all see each other. "
            "Take a method that adapts layers, for example LoRA."
        )
    blocks = structure.blocks_of(structure.last_stack)
    _check_point(structure, point)
    if where == "embeddings":
        return {point.name: PromptHost(point.module, where, point.width, point.width)}, []
    return {
        b.name: PromptHost(structure.root.get_submodule(b.name), where, b.width, b.width)
        for b in blocks
    }, []


def hosts_of(structure: Structure, configs: Mapping[str, Any]) -> dict[str, PromptHost]:
    """Returns the hosts of the prompts among these configurations, by module name.

    Raises TargetError if a prefix is to shift positions that only the model can count.
    """
    for config in configs.values():
        if getattr(config, "shift", 0) and config.where == "attention":
            _check_shift(structure, type(config).__name__)
            break
    kinds = {config.where for config in configs.values() if isinstance(config, PromptMethod)}
    return {
        name: host
        for where in kinds
        for name, host in find_places(structure, where)[0].items()
        if name in configs
    }


def _check_shift(structure: Structure, method: str) -> None:
    """Fairseq's models (Kosmos-2, XGLM) count positions from the padding's id on, in a module of
    their own.
    """
    point = injection_point(structure)
    if (
        point is None
        or not point.decoder
        or "position_ids" not in parameters_of(type(point.module))
    ):
        return
    for label, child in point.module.named_children():
        if callable(getattr(child, "create_position_ids_from_inputs_embeds", None)):
            raise TargetError(
                f"{method}(positions='shifted'): {label!r} of {type(point.module).__name__} counts "
                "positions by itself, so they cannot begin behind the prefix. Write "
                "positions='kept'."
            )


def _check_point(structure: Structure, point: InjectionPoint) -> None:
    """Raises TargetError if virtual tokens that enter there would not be seen, or would have no
    position.
    """
    root, label = type(structure.root).__name__, point.name or type(structure.root).__name__
    config = getattr(point.module, "config", None)
    around = [config, *(getattr(m, "config", None) for m in point.outer)]
    if any(getattr(c, "is_encoder_decoder", False) for c in around):
        raise TargetError(
            f"{root} is an encoder-decoder, and virtual tokens in its decoder are not supported. "
            "Keys and values (weft.Prefix) can be attached to it."
        )
    why = _why_no_virtual_tokens(point)
    if why is not None:
        raise TargetError(
            f"{root} cannot have virtual tokens: {why}. Take a method that adapts layers, for example "
            "LoRA, or keys and values (weft.Prefix) if its attention goes through transformers' "
            "AttentionInterface."
        )
    if point.decoder:
        return
    if getattr(config, "is_decoder", False):
        raise TargetError(
            f"{label!r} is an encoder that is run as a decoder (is_decoder=True), so virtual "
            "tokens behind the prompt would not be seen. Set is_decoder=False."
        )
    first = structure.blocks_of(structure.last_stack)[0]
    relative = _RELATIVE & set(parameters_of(type(structure.root.get_submodule(first.name))))
    if relative:
        raise TargetError(
            f"{label!r} gives its blocks {sorted(relative)[0]!r}, and virtual tokens behind an "
            "embedding module have no position. Keys and values (weft.Prefix) need none."
        )


def _why_no_virtual_tokens(point: InjectionPoint) -> str | None:
    """Why a model that reads more than a text would not know the positions of virtual tokens, or
    None.
    """
    label, own = point.name or type(point.module).__name__, parameters_of(type(point.module))
    for outer in point.outer:
        kind, names = type(outer).__name__, code_names(type(outer))
        if callable(getattr(outer, "get_rope_index", None)):
            return (
                f"{kind} computes three-dimensional positions of text and images before {label!r}"
            )
        masks = [n for n in names if n.startswith("create_") and "mask" in n]
        if masks:
            return f"{kind} prepares the attention mask ({masks[0]}) before {label!r}"
    crossing = [n for n in own if "cross_attention" in n]
    if crossing:
        return (
            f"{label!r} gets one {crossing[0]!r} a text token, and there is none for virtual ones"
        )
    others = [n for n in own if _OTHER_INPUT.match(n)]
    if others and {"input_ids", "inputs_embeds"} & set(own):
        return (
            f"{label!r} joins {others[0]!r} to the text itself, behind the place where they enter"
        )
    return None


def _encoder_decoder(structure: Structure) -> str | None:
    """The innermost encoder-decoder around the last stack that holds both stacks, "" if that is the
    model; None if there is none.
    """
    around, stacks = structure.last_stack or "", {block.stack for block in structure.blocks}
    while around:
        around = around.rpartition(".")[0]
        config = getattr(structure.root.get_submodule(around), "config", None)
        both = sum(not around or within(stack, [around]) for stack in stacks) > 1
        if both and getattr(config, "is_encoder_decoder", False):
            return around
    return None


def _attentions(structure: Structure) -> tuple[dict[str, PromptHost], list[Frozen]]:
    root = structure.root
    both = _encoder_decoder(structure)
    own = structure.blocks_of(structure.last_stack)
    found: dict[str, PromptHost] = {}
    frozen = []
    for block in own if both is None else structure.blocks:
        if both and not within(block.name, [both]):
            reason = f"outside of {both!r}, the encoder-decoder that gets keys and values"
            frozen.append(Frozen(block.name, "block", (block.width,), reason))
            continue
        for name, module in base_modules(root.get_submodule(block.name)):
            full = f"{block.name}.{name}".rstrip(".")
            if not attention.asks(module):
                continue
            if _CROSS.search(name) or getattr(module, "is_cross_attention", False):
                reason = "a cross-attention, which gets no keys and values"
                frozen.append(Frozen(full, "attention", (), reason))
                continue
            why = attention.why_no_prefix(module)
            if why is not None:
                raise TargetError(f"{full!r} can have no keys and values of its own: {why}.")
            found[full] = PromptHost(module, "attention", *_widths(full, module))
    if not found:
        raise TargetError(
            f"{type(root).__name__} has no attention that takes keys and values from outside. "
            "Needed is a transformers model whose attention goes through AttentionInterface; "
            "nn.MultiheadAttention and attention written by hand do not. Take a method that "
            "adapts layers, for example LoRA."
        )
    return found, frozen


def _widths(name: str, module: nn.Module) -> tuple[int, int]:
    """The width of an attention's keys and that of its values, over all key-value heads."""
    maps = [
        next((module._modules[n] for n in names if n in module._modules), None)
        for names in (_KEY_MAPS, _VALUE_MAPS)
    ]
    widths = [getattr(m, "out_features", None) for m in maps]
    if isinstance(widths[0], int) and isinstance(widths[1], int):
        return widths[0], widths[1]
    config = getattr(module, "config", None)
    heads = getattr(config, "num_key_value_heads", None) or getattr(
        config, "num_attention_heads", None
    )
    width = next((w for n in _HEAD_WIDTH if isinstance(w := getattr(module, n, None), int)), None)
    if not isinstance(heads, int) or width is None:
        raise TargetError(
            f"{name!r} ({type(module).__name__}): the number and width of its key-value heads "
            f"cannot be determined. It has neither maps named {_KEY_MAPS[0]!r} and "
            f"{_VALUE_MAPS[0]!r} nor a head_dim and a config with num_attention_heads."
        )
    return heads * width, heads * width
