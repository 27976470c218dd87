"""The module at which virtual tokens enter a model.

Of several stacks (a vision tower and a language model) it is the one before the output. A decoder
takes `inputs_embeds`, an encoder has a child `embeddings`: virtual tokens enter at the innermost
module around the stack that does either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..structure import Structure
from .forward import looks_back, parameters_of


@dataclass(frozen=True, eq=False)
class InjectionPoint:
    """The module that virtual tokens enter, a decoder (by `inputs_embeds`) or an encoder.

    `outer`: the modules around it, from the root. In an encoder, `last` ends the blocks, and
    `behind` are the module's children after it.
    """

    name: str
    module: nn.Module
    decoder: bool
    outer: Sequence[nn.Module] = ()
    last: nn.Module | None = None
    behind: Sequence[nn.Module] = ()

    @property
    def width(self) -> int:
        """The width of the word embedding, or of the output of an encoder's embedding module."""
        if self.decoder:
            table = self.module.get_input_embeddings()  # type: ignore[operator]
            return int(table.weight.shape[1])
        config: Any = self.module.config
        return int(getattr(config, "embedding_size", None) or config.hidden_size)


def injection_point(structure: Structure) -> InjectionPoint | None:
    """Returns the module where virtual tokens enter, or None if there is no such module."""
    root, stack = structure.root, structure.last_stack
    if not stack:
        return None
    name = stack
    while name:
        name = name.rpartition(".")[0]
        module = root.get_submodule(name) if name else root
        encodes = isinstance(module._modules.get("embeddings"), nn.Module)
        if encodes and not looks_back(type(module)):
            last, behind = _behind(structure, name, stack)
            return InjectionPoint(name, module, False, _outer(root, name), last, behind)
        if "inputs_embeds" in parameters_of(type(module)) and callable(
            getattr(module, "get_input_embeddings", None)
        ):
            return InjectionPoint(name, module, True, _outer(root, name))
        if encodes:
            return None
    return None


def _outer(root: nn.Module, name: str) -> list[nn.Module]:
    """The modules around this one, from the root."""
    parts = name.split(".") if name else []
    return [root.get_submodule(".".join(parts[:i])) for i in range(len(parts))]


def _behind(structure: Structure, name: str, stack: str) -> tuple[nn.Module, list[nn.Module]]:
    """The module that ends an encoder's blocks, and the encoder's children after them (a norm, a
    pooler).
    """
    root = structure.root
    own = stack[len(name) :].lstrip(".").split(".")[0]
    children = dict(root.get_submodule(name).named_children())
    labels, last = list(children), children[own]
    if isinstance(last, nn.ModuleList):  # has no forward of its own
        last = root.get_submodule(structure.blocks_of(stack)[-1].name)
    return last, [children[label] for label in labels[labels.index(own) + 1 :]]
