"""The parts of a model, read from its structure: output head, blocks, attention, MLP, norms,
experts and routers.

There is no table of model names. Three conventions are used: transformers' own accessors
(`get_output_embeddings`, `base_model`), repeated blocks in an nn.ModuleList, and "attn",
"attention" or "expert" in the name or the class of a module.
"""

from __future__ import annotations

from functools import cached_property

from torch import nn

from ..base_layers import HeldWeight, Site, carriers, has_map, is_convolution, is_norm
from .blocks import Block, describe_blocks, find_block_names, map_parts, norm_behind, norm_first
from .experts import find_experts, find_routers
from .head import find_head
from .modules import base_modules, base_parameters
from .names import within
from .unread import find_unread


class Structure:
    """The parts of one model, each searched for at most once, at its first use.

    Make one per call and pass it on. Do not keep it: a model may change between two calls.
    """

    def __init__(self, root: nn.Module) -> None:
        self.root = root

    @classmethod
    def of(cls, root: nn.Module) -> Structure:
        """Returns the structure of a model, adapted or not. Nothing is searched for yet."""
        return cls(root)

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """The base model's modules by name."""
        return dict(base_modules(self.root))

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The base model's parameters, each once, under its first name."""
        return dict(base_parameters(self.root))

    @cached_property
    def readers(self) -> dict[str, nn.Parameter]:
        """The base model's parameters under every name, so a tied one several times."""
        return dict(base_parameters(self.root, repeat_tied=True))

    @cached_property
    def layers(self) -> dict[str, Site]:
        """The layers of a class that Weft knows, adaptable or not: linear maps, embeddings,
        convolutions, fused experts, and the maps of nn.MultiheadAttention.
        """
        return {
            name: site
            for name, site in self.carriers.items()
            if (site.is_linear_map if isinstance(site, HeldWeight) else self._is_layer(name, site))
        }

    def _is_layer(self, name: str, module: nn.Module) -> bool:
        return has_map(module) or name not in self.modules

    @cached_property
    def carriers(self) -> dict[str, Site]:
        """The modules, and beside each what has a parameter that is a layer of its own, by its
        name.
        """
        return carriers(self.modules)

    @cached_property
    def held(self) -> dict[str, HeldWeight]:
        """The weights that modules read themselves: of attention, recurrent layers and others."""
        return {n: site for n, site in self.carriers.items() if isinstance(site, HeldWeight)}

    @cached_property
    def norms(self) -> list[str]:
        """Layer norms and RMS norms with a gain."""
        return [name for name, module in self.modules.items() if is_norm(module)]

    @cached_property
    def block_names(self) -> list[str]:
        """The outermost repeated blocks."""
        return find_block_names(self.modules)

    @cached_property
    def blocks(self) -> list[Block]:
        """Every block of every stack, in order."""
        return describe_blocks(self.root, self.block_names)

    @cached_property
    def head(self) -> list[str]:
        """The modules of the output head that hold parameters; empty if there are none."""
        return find_head(self.root, self.modules, self.block_names)

    @cached_property
    def unread(self) -> dict[str, str]:
        """The outermost modules that change no output, with the reasons."""
        return find_unread(self.root, self.modules, self.block_names, self.head)

    def why_unread(self, name: str) -> str | None:
        """Returns why a module or a tensor changes no output, or None if it may change one."""
        return next((why for module, why in self.unread.items() if within(name, [module])), None)

    @cached_property
    def experts(self) -> dict[str, int]:
        """The containers of routed experts, with the number of experts in each."""
        return find_experts(self.modules)

    @cached_property
    def routers(self) -> list[str]:
        """The routers of the mixtures of experts."""
        return find_routers(self.root, self.experts)

    @cached_property
    def map_parts(self) -> dict[str, str]:
        """ "attention" or "mlp" for every linear map inside a block, and "conv" for every
        convolution, adaptable or not.
        """
        convolutions = [name for name, module in self.layers.items() if is_convolution(module)]
        maps = map_parts(self.root, self.modules, self.block_names)
        held = [name for name, each in self.held.items() if each.is_linear_map]
        inside = [name for name in held if within(name, self.block_names)]
        maps |= dict.fromkeys(inside, "attention")
        return {**maps, **dict.fromkeys(convolutions, "conv")}

    def is_part(self, name: str, keyword: str) -> bool:
        """Returns whether a layer is one of those that "all-linear", "attention", "mlp" or "conv"
        means, apart from those that "all-linear" leaves out.
        """
        part = self.map_parts.get(name)
        return part != "conv" if keyword == "all-linear" else part == keyword

    @cached_property
    def last_stack(self) -> str | None:
        """The stack before the output; of several (encoder and decoder, two towers) the one in one
        module with the output head, or else the one registered last. None if there is no block.

        Blocks inside the output head do not count; nor do lists without attention if others have
        it.
        """
        found = [block for block in self.blocks if not within(block.name, self.head)]
        best = [block for block in found if block.attention_outputs] or found
        for head in self.head:
            around = head.rpartition(".")[0]
            while around and not any(within(block.name, [around]) for block in best):
                around = around.rpartition(".")[0]
            if around:
                best = [block for block in best if within(block.name, [around])]
        return best[-1].stack if best else None

    def blocks_of(self, stack: str | None) -> list[Block]:
        """Returns the blocks of one stack, in order."""
        return [block for block in self.blocks if block.stack == stack]

    def final_norm(self, stack: str) -> str | None:
        """Returns the norm that follows a stack, outside any block; None if each block ends in a
        norm of its own.
        """
        blocks = self.blocks_of(stack)
        if not blocks:
            return None
        if blocks[0].mlp_norm is not None and norm_first(self.root, blocks[0].name) is None:
            return None
        return norm_behind(self.root, stack)
