"""What a model is made of, read from its structure: output head, blocks, attention, experts and
their routers.

Nothing here is a table of model names. Three conventions of the ecosystem are used: transformers'
own accessors (`get_output_embeddings`, `base_model`), repeated blocks in an nn.ModuleList, and
"attn"/"attention" or "expert" in the name or the class of a module.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import accumulate

from torch import nn

from .base_layers import is_linear
from .layer import CHILD, is_adapted

# What people call the output layer of a plain torch model, as a direct child of the root.
_HEAD_NAMES = (
    "head",
    "heads",
    "lm_head",
    "output_head",
    "classifier",
    "classification_head",
    "score",
    "fc",
)
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_EXPERTS = re.compile(r"experts?(_|$)|experts", re.IGNORECASE)
_SHARED_EXPERT = re.compile(r"shared_?expert", re.IGNORECASE)

# What torch.compile, FSDP and activation checkpointing put into the names of what they wrap.
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def canonical(name: str) -> str:
    """A name without the parts that wrappers put into it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def base_modules(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`root.named_modules()` without what Weft has added to adapted layers."""
    ours = _ours(root)
    for name, module in root.named_modules():
        if not _inside(name, ours):
            yield name, module


def base_parameters(
    root: nn.Module, repeat_tied: bool = False
) -> Iterator[tuple[str, nn.Parameter]]:
    """`root.named_parameters()` without those of Weft; a tied tensor once, under its first name, or
    under each.
    """
    ours = _ours(root)
    for name, parameter in root.named_parameters(remove_duplicate=not repeat_tied):
        if not _inside(name, ours):
            yield name, parameter


def _ours(root: nn.Module) -> set[str]:
    return {
        f"{name}.{CHILD}".lstrip(".")
        for name, module in root.named_modules(remove_duplicate=False)
        if is_adapted(module)
    }


def _inside(name: str, places: set[str]) -> bool:
    """The name is, or lies in, one of many places."""
    return bool(places) and any(
        part in places for part in accumulate(name.split("."), "{}.{}".format)
    )


def head_modules(root: nn.Module) -> list[str]:
    """Names of the modules that make up the output head, those that hold parameters; empty where
    there is none.
    """
    found = dict.fromkeys(_beside_base_model(root))
    output = _accessor(root, "get_output_embeddings")
    if output is not None:
        found |= dict.fromkeys(
            name for name, module in base_modules(root) if module is output and name
        )
    if not found:
        found = dict.fromkeys(_conventional_head(root))
    return [name for name in found if next(root.get_submodule(name).parameters(), None) is not None]


def within(name: str, modules: list[str]) -> bool:
    """`name` is one of these modules or lies inside one."""
    return any(name == module or name.startswith(module + ".") for module in modules)


def attention_or_mlp(root: nn.Module) -> dict[str, str]:
    """Linear map inside a repeated block, adaptable or not -> "attention" or "mlp"."""
    blocks = list(block_names(root))
    kinds = {}
    for name, module in base_modules(root):
        block = next((b for b in blocks if name.startswith(b + ".")), None)
        if block is not None and _is_map(module):
            kinds[name] = "attention" if _in_attention(root, block, name) else "mlp"
    return kinds


def expert_modules(root: nn.Module) -> dict[str, int]:
    """Containers of a mixture's routed experts -> how many experts they hold."""
    found: dict[str, int] = {}
    for name, module in base_modules(root):
        label = name.rpartition(".")[2]
        if not name or within(name, list(found)) or _SHARED_EXPERT.search(label):
            continue
        if _EXPERTS.search(label) or "Experts" in type(module).__name__:
            count = _expert_count(module)
            if count > 1:
                found[name] = count
    return found


def router_modules(root: nn.Module, experts: dict[str, int]) -> list[str]:
    """Modules beside the experts whose weight has one row per expert, or the single row of a shared
    expert's gate.
    """
    routers = []
    for container, count in experts.items():
        parent = container.rpartition(".")[0]
        for name, module in root.get_submodule(parent).named_modules(prefix=parent):
            weight = module._parameters.get("weight")
            if (
                within(name, list(experts))
                or weight is None
                or weight.ndim != 2
                or weight.shape[0] not in (1, count)
            ):
                continue
            beside = name.removeprefix(parent).rpartition(".")[0]
            # A key projection beside the experts may have as many rows as there are experts.
            if not _SHARED_EXPERT.search(beside) and not _ATTENTION.search(beside):
                routers.append(name)
    return list(dict.fromkeys(routers))


def _beside_base_model(root: nn.Module) -> Iterator[str]:
    """transformers: a task model is a base model and, beside it, the head."""
    prefix = getattr(root, "base_model_prefix", "")
    if not isinstance(prefix, str) or not isinstance(root._modules.get(prefix), nn.Module):
        return
    for name, child in root.named_children():
        if name != prefix and not _is_model(child):
            yield name


def _is_model(module: nn.Module) -> bool:
    """A second tower (a vision encoder, say) has an input or a configuration of its own; a head has
    neither.
    """
    return len(list(block_names(module))) > 1


def _conventional_head(root: nn.Module) -> Iterator[str]:
    for name, child in root.named_children():
        if name not in _HEAD_NAMES:
            continue
        inside = set(child.modules())
        if any(_is_map(module) and module not in inside for module in root.modules()):
            yield name


def _accessor(root: nn.Module, name: str) -> nn.Module | None:
    method = getattr(root, name, None)
    try:
        found = method() if callable(method) else None
    except (NotImplementedError, AttributeError):  # what transformers raises where a model has none
        return None
    return found if isinstance(found, nn.Module) else None


def block_names(root: nn.Module) -> Iterator[str]:
    """Outermost repeated blocks with linear maps inside: elements of an nn.ModuleList or of an
    nn.Sequential of equals.
    """
    outer: list[str] = []
    for name, module in base_modules(root):
        if within(name, outer):
            continue
        if isinstance(module, nn.ModuleList) or (
            isinstance(module, nn.Sequential) and _alike(module)
        ):
            blocks = [
                f"{name}.{i}".lstrip(".")
                for i, child in module.named_children()
                if any(_is_map(m) for m in child.modules() if m is not child)
            ]
            outer += blocks
            yield from blocks


def attention_modules(block: nn.Module) -> list[str]:
    """Outermost modules of a block that its attention is made of, in order: T5's decoder has two,
    self and cross.
    """
    found: list[str] = []
    for name, module in base_modules(block):
        label = name.rpartition(".")[2]
        if (
            not name
            or within(name, found)
            or not (_ATTENTION.search(label) or _ATTENTION.search(type(module).__name__))
        ):
            continue
        if any(_is_map(inner) for inner in module.modules() if inner is not module):
            found.append(name)
    return found


def _alike(module: nn.Sequential) -> bool:
    return len(module) > 1 and len({type(child) for child in module}) == 1


def _is_map(module: nn.Module) -> bool:
    return is_linear(module)


def _in_attention(root: nn.Module, block: str, name: str) -> bool:
    return any(_ATTENTION.search(part) for part in _path(root, block, name))


def _path(root: nn.Module, block: str, name: str) -> Iterator[str]:
    """Names and class names on the way from the block down to a layer's parent."""
    place = block
    for part in name[len(block) + 1 :].split(".")[:-1]:
        place = f"{place}.{part}"
        yield part
        yield type(root.get_submodule(place)).__name__


def _expert_count(module: nn.Module) -> int:
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        return len(module)
    stacked = [p.shape[0] for p in module._parameters.values() if p is not None and p.ndim == 3]
    return max(stacked, default=0)
