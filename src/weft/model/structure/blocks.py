"""The repeated blocks of a transformer, and the layers in them that adapters attach to.

A block's attention ends in one linear map and so does its MLP: the last one registered with as many
outputs as the block is wide. Both come before their residual sum. A mixture of experts has no such
map, and the block has the reason.

A block is post-norm (BERT, BART) if the layer norm follows the residual sum, and pre-norm (GPT-2,
Llama, ViT, T5) if it precedes attention and MLP. The order is code and not structure, so it is
inferred from three signs: torch's own flag `norm_first`; a norm of the block's width in one
submodule with the MLP's output map (BERT's `output`); and the norm behind the last block, which a
pre-norm stack needs and a post-norm stack does not have.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from ..base_layers import is_linear, is_norm, kind_of
from .experts import find_experts
from .modules import base_modules
from .names import ATTENTION, within


@dataclass(frozen=True)
class Block:
    """One repeated block. `stack` is the list that contains it, `index` its index there, from the
    input.

    `attention_outputs`: one per attention module, so two in a decoder with cross-attention.
    `mlp_norm`: the layer norm after the MLP's residual sum, in a post-norm block only. `missing`:
    the reason why a part is missing, by role.
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
        """Returns the modules of a role, one of `target_spec.ROLES`."""
        if role == "attention-output":
            return self.attention_outputs
        last = self.mlp_output if role == "mlp-output" or self.mlp_norm is None else self.mlp_norm
        return (last,) if last is not None else ()

    def why_not(self, role: str) -> str:
        """Returns the reason why the block has no module of a role."""
        return dict(self.missing).get(
            "attention-output" if role == "attention-output" else "mlp-output", ""
        )


def find_block_names(modules: Mapping[str, nn.Module]) -> list[str]:
    """Returns the outermost repeated blocks that contain linear maps: elements of an nn.ModuleList,
    or of an nn.Sequential whose elements have one class. Of the lists of one module, those without
    attention are none if another has it (Qwen3-VL's mergers beside its blocks).
    """
    found: list[str] = []
    for name, module in modules.items():
        if within(name, found):
            continue
        if isinstance(module, nn.ModuleList) or (
            isinstance(module, nn.Sequential) and _alike(module)
        ):
            found += [
                f"{name}.{i}".lstrip(".")
                for i, child in module.named_children()
                if any(is_linear(m) for m in child.modules() if m is not child)
            ]
    stacks = {name: name.rpartition(".")[0] for name in found}
    attending = {
        stacks[name] for name in found if _attention_modules(dict(modules[name].named_modules()))
    }
    beside = {stack.rpartition(".")[0] for stack in attending}
    return [
        name
        for name, stack in stacks.items()
        if stack in attending or stack.rpartition(".")[0] not in beside
    ]


def describe_blocks(root: nn.Module, names: Sequence[str]) -> list[Block]:
    """Returns the blocks of these names, in order."""
    found: list[Block] = []
    counts: dict[str, int] = {}
    norms: dict[str, str | None] = {}
    for name in names:
        stack = name.rpartition(".")[0]
        index = counts[stack] = counts.get(stack, -1) + 1
        if stack not in norms:
            norms[stack] = norm_behind(root, stack)
        found.append(_block(root, name, stack, index, norms[stack]))
    return found


def map_parts(
    root: nn.Module, modules: Mapping[str, nn.Module], names: Sequence[str]
) -> dict[str, str]:
    """Returns "attention" or "mlp" for every linear map inside one of the blocks `names`, adaptable
    or not.
    """
    parts = {}
    for name, module in modules.items():
        if not is_linear(module):
            continue
        block = next((b for b in names if name.startswith(b + ".")), None)
        if block is not None:
            parts[name] = "attention" if _in_attention(root, block, name) else "mlp"
    return parts


def norm_first(root: nn.Module, block: str) -> bool | None:
    """The flag of nn.TransformerEncoderLayer; None if the block has none."""
    flag = getattr(root.get_submodule(block), "norm_first", None)
    return flag if isinstance(flag, bool) else None


def norm_behind(root: nn.Module, stack: str) -> str | None:
    """Returns the norm registered after a stack in the same module, or named as final; None if
    there is none. If the module holds nothing but the stack, the search continues around it.
    """
    if not stack:  # the model is the list of blocks itself
        return None
    parent, _, own = stack.rpartition(".")
    module = root.get_submodule(parent) if parent else root
    children = list(module.named_children())
    labels = [label for label, _ in children]
    for index, (label, child) in enumerate(children):
        behind = "final" in label or (
            index > labels.index(own) and "embed" not in label
        )  # BART: layernorm_embedding
        if behind and is_norm(child):
            return f"{parent}.{label}".lstrip(".")
    if parent and all(
        next(child.parameters(), None) is None for label, child in children if label != own
    ):
        return norm_behind(root, parent)
    return None


def _block(root: nn.Module, name: str, stack: str, index: int, behind: str | None) -> Block:
    inside = {n: m for n, m in base_modules(root.get_submodule(name)) if n}
    attentions = _attention_modules(inside)
    maps = {n: shape for n, m in inside.items() if (shape := _map_shape(m)) is not None}
    of_attention = {a: [n for n in maps if within(n, [a])] for a in attentions}
    # The first map of the attention reads the block's own stream.
    entry = next((names[0] for names in of_attention.values() if names), next(iter(maps), None))
    width = maps[entry][1] if entry is not None else 0
    outputs = [last for names in of_attention.values() if (last := _last(maps, names, width))]
    missing = {}
    if not outputs:
        missing["attention-output"] = "it has no attention that ends in a linear map of its width"
    mlp_output = _last(maps, [n for n in maps if not within(n, attentions)], width)
    experts = find_experts(inside)
    if experts:
        container, count = next(iter(experts.items()))
        mlp_output = None
        missing["mlp-output"] = (
            f"its MLP is a mixture of {count} experts ({container!r}), which has no single output "
            "map"
        )
    elif mlp_output is None:
        missing["mlp-output"] = (
            "outside its attention it has no linear map with as many outputs as the block is wide"
        )
    norm = _norm_beside(inside, mlp_output, width)
    first = norm_first(root, name)
    if norm is None and first is not True and (first is False or behind is None):
        norm = _last_norm(inside, attentions, width)
    return Block(
        name,
        stack,
        index,
        width,
        tuple(f"{name}.{part}" for part in outputs),
        f"{name}.{mlp_output}" if mlp_output else None,
        f"{name}.{norm}" if norm else None,
        tuple(missing.items()),
    )


def _attention_modules(inside: Mapping[str, nn.Module]) -> list[str]:
    """The outermost attention modules of a block, in order: T5's decoder has two, self and
    cross.
    """
    found: list[str] = []
    for name, module in inside.items():
        label = name.rpartition(".")[2]
        if within(name, found) or not (
            ATTENTION.search(label) or ATTENTION.search(type(module).__name__)
        ):
            continue
        if any(is_linear(inner) for inner in module.modules() if inner is not module):
            found.append(name)
    return found


def _map_shape(module: nn.Module) -> tuple[int, int] | None:
    """(out, in) of a linear map, adaptable or not; None for any other module."""
    if not is_linear(module):
        return None
    weight = module._parameters.get("weight")
    if weight is None or weight.ndim != 2:  # quantised or parametrised
        out, in_ = getattr(module, "out_features", None), getattr(module, "in_features", None)
        return (out, in_) if isinstance(out, int) and isinstance(in_, int) else None
    first, second = weight.shape
    kind = kind_of(module)
    return (second, first) if kind is not None and kind.transposed else (first, second)


def _last(maps: Mapping[str, tuple[int, int]], names: Iterable[str], width: int) -> str | None:
    return next((n for n in reversed(list(names)) if maps[n][0] == width), None)


def _norm_beside(inside: Mapping[str, nn.Module], mlp_output: str | None, width: int) -> str | None:
    """A norm of the block's width in one submodule of the block with the MLP's output map."""
    parent = mlp_output.rpartition(".")[0] if mlp_output else ""
    if not parent:
        return None
    return next(
        (n for n, m in inside.items() if n.rpartition(".")[0] == parent and is_norm(m, width)), None
    )


def _last_norm(
    inside: Mapping[str, nn.Module], attentions: Sequence[str], width: int
) -> str | None:
    """The last norm of a post-norm block outside its attention."""
    norms = [n for n, m in inside.items() if is_norm(m, width) and not within(n, attentions)]
    return norms[-1] if norms else None


def _alike(module: nn.Sequential) -> bool:
    return len(module) > 1 and len({type(child) for child in module}) == 1


def _in_attention(root: nn.Module, block: str, name: str) -> bool:
    return any(ATTENTION.search(part) for part in _path(root, block, name))


def _path(root: nn.Module, block: str, name: str) -> Iterator[str]:
    """Names and class names from the block down to a layer's parent."""
    module = block
    for part in name[len(block) + 1 :].split(".")[:-1]:
        module = f"{module}.{part}"
        yield part
        yield type(root.get_submodule(module)).__name__
