"""Where the prompt family hangs on: self-attentions, the model's input, or blocks, found by
structure.

Of several stacks (a vision tower and a language model) it is the one before the output; an
encoder-decoder has its prefixes in both. A decoder takes `inputs_embeds`, an encoder has a child
`embeddings`: the innermost module around the stack that does either is where virtual tokens enter.
Everything here is a convention of transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import TargetError
from ..methods.base import PromptMethod
from . import attention, roles
from .layer import adopt, is_adapted
from .plan import Frozen
from .state import find_state
from .structure import base_modules
from .virtual import Entry, Gate, looks_back, parameters_of

if TYPE_CHECKING:
    from .adapter import Adapter
    from .state import State

_CROSS = re.compile(r"cross|encdec|encoder_att", re.IGNORECASE)
_RELATIVE = {
    "position_embeddings",
    "position_bias",
    "relative_pos",
    "rel_embeddings",
}  # what a block is told of positions
_KEY_MAPS = ("k_proj", "key", "k", "k_lin", "key_proj")
_VALUE_MAPS = ("v_proj", "value", "v", "v_lin", "value_proj")
_HEAD_WIDTH = ("head_dim", "attention_head_size", "key_value_proj_dim", "head_size")


@dataclass(frozen=True, eq=False)
class PromptHost:
    """What a prompt sees of its place: `kind` is "attention", "embeddings" or "block"; widths of
    keys and values, or twice the width of the states.
    """

    module: nn.Module
    kind: str
    out_features: int
    in_features: int
    takes_ids: ClassVar[bool] = False
    has_weight: ClassVar[bool] = True  # of no layer: it is never asked for
    transposed: ClassVar[bool] = False

    @property
    def device(self) -> torch.device:
        return next(p.device for p in self.module.parameters())

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.kind == "attention":  # of a pickle, perhaps in a process that knows nothing of us
            attention.register()


def places(root: nn.Module, at: str) -> tuple[dict[str, PromptHost], list[Frozen]]:
    """The hosts by module name, and what could have been one and is not. Raises TargetError, naming
    what is needed.
    """
    if at == "attention":
        return _attentions(root)
    entry = entry_of(root)
    if entry is None:
        raise TargetError(
            f"{type(root).__name__} has no place where virtual tokens could enter: needed is a "
            "transformers "
            "model that takes inputs_embeds (GPT-2, Llama) or has a module `embeddings` (BERT, "
            "ViT) before "
            "its blocks, whose tokens all see each other. Take a method that adapts layers, for "
            "example LoRA."
        )
    config = getattr(entry.module, "config", None)
    if any(
        getattr(c, "is_encoder_decoder", False)
        for c in (config, *(getattr(m, "config", None) for m in entry.above))
    ):
        raise TargetError(
            f"{type(root).__name__} is an encoder-decoder, whose decoder Weft does not give "
            "virtual tokens. "
            "Keys and values (weft.Prefix) can be attached to it."
        )
    if not entry.decoder and getattr(config, "is_decoder", False):
        raise TargetError(
            f"{entry.name or type(root).__name__!r} is an encoder that is run as a decoder "
            "(is_decoder=True), "
            "where virtual tokens behind the prompt would not be seen. Set is_decoder=False."
        )
    stack = roles.last_stack(root)
    blocks = [b for b in roles.blocks(root) if b.stack == stack]
    relative = _RELATIVE & {
        name for b in blocks[:1] for name in parameters_of(type(root.get_submodule(b.name)))
    }
    if not entry.decoder and relative:
        raise TargetError(
            f"{entry.name or type(root).__name__!r} gives its blocks {sorted(relative)[0]!r}, and "
            "virtual "
            "tokens behind an embedding module have no position. Keys and values (weft.Prefix) "
            "need none."
        )
    if at == "embeddings":
        width = _entry_width(entry)
        return {entry.name: PromptHost(entry.module, at, width, width)}, []
    return {
        b.name: PromptHost(root.get_submodule(b.name), at, b.width, b.width) for b in blocks
    }, []


def hosts_of(root: nn.Module, names: Mapping[str, Any]) -> dict[str, PromptHost]:
    """The hosts of the prompts among these rules."""
    kinds = {rule.at for rule in names.values() if isinstance(rule, PromptMethod)}
    return {
        name: host for at in kinds for name, host in places(root, at)[0].items() if name in names
    }


def entry_of(root: nn.Module) -> Entry | None:
    """Where virtual tokens enter; None where there is no such place."""
    stack = roles.last_stack(root)
    if not stack:
        return None
    name = stack
    while name:
        name = name.rpartition(".")[0]
        module = root.get_submodule(name) if name else root
        encodes, back = (
            isinstance(module._modules.get("embeddings"), nn.Module),
            looks_back(type(module)),
        )
        if encodes and not back:
            return Entry(name, module, False, _above(root, name), *_behind(root, name, stack))
        if "inputs_embeds" in parameters_of(type(module)) and callable(
            getattr(module, "get_input_embeddings", None)
        ):
            return Entry(name, module, True, _above(root, name))
        if encodes:
            return None
    return None


def _above(root: nn.Module, name: str) -> list[nn.Module]:
    """The modules around this one, from the root."""
    parts = name.split(".") if name else []
    return [root.get_submodule(".".join(parts[:i])) for i in range(len(parts))]


def _behind(root: nn.Module, name: str, stack: str) -> tuple[nn.Module, list[nn.Module]]:
    """What ends an encoder's blocks, and the encoder's children after them (a norm, a pooler)."""
    own = stack[len(name) :].lstrip(".").split(".")[0]
    children = dict(root.get_submodule(name).named_children())
    labels, holder = list(children), children[own]
    if isinstance(holder, nn.ModuleList):  # has no forward of its own
        holder = root.get_submodule([b.name for b in roles.blocks(root) if b.stack == stack][-1])
    return holder, [children[label] for label in labels[labels.index(own) + 1 :]]


def install(state: State, adapter: Adapter) -> None:
    """Hang the sites of a prompt on their modules, which keep their class and forward."""
    rule = adapter.config
    entry = entry_of(state.root)
    if state.virtual is None and entry is not None and (rule.at != "attention" or entry.decoder):
        state.virtual = Gate(entry, state.active)
    if state.virtual is not None:
        state.virtual.add(adapter.name, rule)
    for site in adapter.layers.values():
        if not is_adapted(site.base.module):
            before = {
                "attention": attention.check,
                "block": state.virtual.replace if state.virtual else None,
            }.get(rule.at)
            adopt(site.base.module, state.active, before)
    if rule.at == "attention":
        attention.claim(site.base.module for site in adapter.layers.values())


@contextmanager
def answering(model: nn.Module, labels: Tensor | None) -> Iterator[None]:
    """Tell virtual tokens where the answers begin, around a forward that is not given the
    labels.
    """
    state = find_state(model)
    gate = state.virtual if state is not None else None
    if gate is None or not gate.decoder or not gate.next_token:
        yield
        return
    gate.told = labels
    try:
        yield
    finally:
        gate.told = None


def uninstall(state: State, adapter: Adapter) -> None:
    """Undo what `install` did to the model beside its sites, which the caller takes off."""
    if state.virtual is not None:
        state.virtual.drop(adapter.name)
        if not state.virtual.rules:
            state.virtual.close()
            state.virtual = None
    if adapter.config.at == "attention":
        still = [
            site.base.module
            for other in state.adapters.values()
            if other is not adapter
            for site in other.layers.values()
            if site.base.kind == "attention"
        ]
        attention.release([site.base.module for site in adapter.layers.values()], still)


def _attentions(root: nn.Module) -> tuple[dict[str, PromptHost], list[Frozen]]:
    both = getattr(getattr(root, "config", None), "is_encoder_decoder", False)
    stack = roles.last_stack(root)
    blocks = [b.name for b in roles.blocks(root) if both or b.stack == stack]
    found, frozen = {}, []
    for block in blocks:
        for name, module in base_modules(root.get_submodule(block)):
            full = f"{block}.{name}".rstrip(".")
            if not attention.asks(module):
                continue
            if _CROSS.search(name) or getattr(module, "is_cross_attention", False):
                frozen.append(
                    Frozen(
                        full, "attention", (), "a cross-attention, which gets no keys and values"
                    )
                )
                continue
            why = attention.why_not(module)
            if why is not None:
                raise TargetError(f"{full!r} can have no keys and values of its own: {why}.")
            found[full] = PromptHost(module, "attention", *_widths(full, module))
    if not found:
        raise TargetError(
            f"{type(root).__name__} has no attention that takes keys and values from outside: "
            "needed is a "
            "transformers model whose attention goes through AttentionInterface. "
            "nn.MultiheadAttention and "
            "attention written by hand do not. Take a method that adapts layers, for example LoRA."
        )
    return found, frozen


def _widths(name: str, module: nn.Module) -> tuple[int, int]:
    """Width of an attention's keys and of its values, over all key-value heads."""
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
            f"{name!r} ({type(module).__name__}): the number and width of its key-value heads are "
            "not to be "
            f"seen: it has neither maps named {_KEY_MAPS[0]!r} and {_VALUE_MAPS[0]!r} nor a "
            "head_dim and a "
            "config that says num_attention_heads."
        )
    return heads * width, heads * width


def _entry_width(entry: Entry) -> int:
    """Width of what enters there: of the word embedding, or of what an encoder's embedding module
    gives.
    """
    if entry.decoder:
        table = entry.module.get_input_embeddings()  # type: ignore[operator]
        return int(table.weight.shape[1])
    config: Any = entry.module.config
    return int(getattr(config, "embedding_size", None) or config.hidden_size)
