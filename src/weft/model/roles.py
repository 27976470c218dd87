"""The parts of a transformer's blocks that adapters hang on, found by structure.

A block's attention ends in one linear map and so does its MLP: the last that the part registers
with as many outputs as the block is wide. Both maps stand before their residual sum. Where the MLP
is a mixture of experts there is no such map, and the block says why.

A block is post-norm (BERT, BART) where the layer norm stands behind the residual sum, and pre-norm
(GPT-2, Llama, ViT, T5) where it stands before attention and MLP. The order of the sum is code and
not structure, so it is told by three signs: torch's own flag `norm_first`; a norm of the block's
width in one submodule with the MLP's output map (BERT's `output`); and the norm that a pre-norm
stack needs behind its last block and a post-norm stack has not.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import nn

from .base_layers import is_linear, is_norm, kind_of
from .structure import (
    attention_modules,
    base_modules,
    block_names,
    expert_modules,
    head_modules,
    within,
)


@dataclass(frozen=True)
class Block:
    """One repeated block. `stack` is the list it is in, `index` its place there, counted from the
    input.

    `attention_outputs`: one a attention module, so two in a decoder with cross-attention.
    `mlp_norm`: the layer norm behind the MLP's residual sum, of a post-norm block only. `missing`:
    why a part is not there, by role.
    """

    name: str
    stack: str
    index: int
    width: int
    attention_outputs: tuple[str, ...]
    mlp_output: str | None
    mlp_norm: str | None
    missing: tuple[tuple[str, str], ...] = ()

    def of(self, role: str) -> tuple[str, ...]:
        """The modules of a role, one of `target_spec.ROLES`."""
        if role == "attention-output":
            return self.attention_outputs
        last = self.mlp_output if role == "mlp-output" or self.mlp_norm is None else self.mlp_norm
        return (last,) if last is not None else ()

    def why_not(self, role: str) -> str:
        """Why the block has no module of a role."""
        return dict(self.missing).get(
            "attention-output" if role == "attention-output" else "mlp-output", ""
        )


def blocks(root: nn.Module) -> list[Block]:
    """Every block of every stack, in order."""
    found: list[Block] = []
    places: dict[str, int] = {}
    ends: dict[str, str | None] = {}
    for name in block_names(root):
        stack = name.rpartition(".")[0]
        index = places[stack] = places.get(stack, -1) + 1
        block = _block(root, name, stack, index)
        if stack not in ends:
            ends[stack] = _norm_behind(root, stack)
        found.append(
            block
            if block.mlp_norm
            else replace(block, mlp_norm=_last_norm(root, block, ends[stack]))
        )
    return found


def final_norm(root: nn.Module, stack: str) -> str | None:
    """The normalisation that follows a stack, outside any block; None where each block ends in a
    norm of its own.
    """
    first = next((block for block in blocks(root) if block.stack == stack), None)
    if first is None or (first.mlp_norm is not None and _flag(root, first) is None):
        return None
    return _norm_behind(root, stack)


def last_stack(root: nn.Module) -> str | None:
    """The stack before the output: of several (encoder and decoder, two towers) the one that is
    registered last.

    Blocks inside the output head are none of the model's; nor are lists without attention beside
    those that have it.
    """
    heads = head_modules(root)
    found = [block for block in blocks(root) if not within(block.name, heads)]
    best = [block for block in found if block.attention_outputs] or found
    return best[-1].stack if best else None


def _block(root: nn.Module, name: str, stack: str, index: int) -> Block:
    block = root.get_submodule(name)
    inside = {n: m for n, m in base_modules(block) if n}
    attentions = attention_modules(block)
    maps = {n: shape for n, m in inside.items() if (shape := _shape(m)) is not None}
    of_attention = {a: [n for n in maps if within(n, [a])] for a in attentions}
    # The first map of the attention reads the block's own stream.
    entry = next((names[0] for names in of_attention.values() if names), next(iter(maps), None))
    width = maps[entry][1] if entry is not None else 0
    outputs = [last for names in of_attention.values() if (last := _last(maps, names, width))]
    missing = (
        {}
        if outputs
        else {"attention-output": "it has no attention that ends in a linear map of its width"}
    )
    mlp_output = _last(maps, [n for n in maps if not within(n, attentions)], width)
    experts = expert_modules(block)
    if experts:
        place, count = next(iter(experts.items()))
        mlp_output = None
        missing["mlp-output"] = (
            f"its MLP is a mixture of {count} experts ({place!r}), which has no single output map"
        )
    elif mlp_output is None:
        missing["mlp-output"] = (
            "outside its attention it has no linear map with as many outputs as the block is wide"
        )
    beside = _norm_beside(inside, mlp_output, width)

    def full(part: str | None) -> str | None:
        return None if part is None else f"{name}.{part}"

    return Block(
        name,
        stack,
        index,
        width,
        tuple(f"{name}.{part}" for part in outputs),
        full(mlp_output),
        full(beside),
        tuple(missing.items()),
    )


def _shape(module: nn.Module) -> tuple[int, int] | None:
    """(out, in) of a linear map, adaptable or not; None for anything else."""
    weight = module._parameters.get("weight")
    if not is_linear(module):
        return None
    if weight is None or weight.ndim != 2:  # quantised or parametrised
        out, in_ = getattr(module, "out_features", None), getattr(module, "in_features", None)
        return (out, in_) if isinstance(out, int) and isinstance(in_, int) else None
    first, second = weight.shape
    kind = kind_of(module)
    return (second, first) if kind is not None and kind.transposed else (first, second)


def _last(maps: dict[str, tuple[int, int]], names: Iterable[str], width: int) -> str | None:
    return next((n for n in reversed(list(names)) if maps[n][0] == width), None)


def _norm_beside(inside: dict[str, nn.Module], mlp_output: str | None, width: int) -> str | None:
    """A norm of the block's width in one submodule of the block with the MLP's output map."""
    parent = mlp_output.rpartition(".")[0] if mlp_output else ""
    if not parent:
        return None
    return next(
        (n for n, m in inside.items() if n.rpartition(".")[0] == parent and is_norm(m, width)), None
    )


def _last_norm(root: nn.Module, block: Block, behind: str | None) -> str | None:
    """The block's last norm outside its attention, where the block is post-norm."""
    first = _flag(root, block)
    if first is True or (first is None and behind is not None):
        return None
    module = root.get_submodule(block.name)
    attentions = attention_modules(module)
    norms = [
        n
        for n, m in base_modules(module)
        if n and is_norm(m, block.width) and not within(n, attentions)
    ]
    return f"{block.name}.{norms[-1]}" if norms else None


def _flag(root: nn.Module, block: Block) -> bool | None:
    """nn.TransformerEncoderLayer says which it is."""
    flag = getattr(root.get_submodule(block.name), "norm_first", None)
    return flag if isinstance(flag, bool) else None


def _norm_behind(root: nn.Module, stack: str) -> str | None:
    """The norm registered after a stack in the same module, or named as final; looked for further
    out where the module holds nothing but the stack.
    """
    if not stack:  # the model is the list of blocks itself
        return None
    parent, _, own = stack.rpartition(".")
    module = root.get_submodule(parent) if parent else root
    children = list(module.named_children())
    labels = [label for label, _ in children]
    for place, (label, child) in enumerate(children):
        behind = "final" in label or (
            place > labels.index(own) and "embed" not in label
        )  # BART: layernorm_embedding
        if behind and is_norm(child):
            return f"{parent}.{label}".lstrip(".")
    if parent and all(
        next(child.parameters(), None) is None for label, child in children if label != own
    ):
        return _norm_behind(root, parent)
    return None
