"""The output head of a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from ..base_layers import is_convolution, is_linear
from .names import within

# Common names of the output layer of a plain torch model, as a direct child of the root.
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


def find_head(
    root: nn.Module, modules: Mapping[str, nn.Module], blocks: Sequence[str]
) -> list[str]:
    """Returns the modules of the output head that hold parameters; empty if there are none.

    `modules` are the model's own and `blocks` the names of its repeated blocks.
    """
    found = dict.fromkeys(_head_of("", root, modules, blocks))
    if not found:
        found = dict.fromkeys(_heads_inside(modules, blocks))
    if not found:
        found = dict.fromkeys(_conventional_head(root))
    return [name for name in found if next(root.get_submodule(name).parameters(), None) is not None]


def _head_of(
    name: str, module: nn.Module, modules: Mapping[str, nn.Module], blocks: Sequence[str]
) -> Iterator[str]:
    """The head of one model of transformers, which may be a part of another, by full names."""
    inner = [
        block[len(name) :].lstrip(".") for block in blocks if within(block, [name]) or not name
    ]
    yield from (f"{name}.{label}".lstrip(".") for label in _beside_base_model(module, inner))
    output = _output_embeddings(module)
    if output is not None:
        yield from (n for n, other in modules.items() if other is output and n)


def _heads_inside(modules: Mapping[str, nn.Module], blocks: Sequence[str]) -> Iterator[str]:
    """The head of a language model within a model that does not tell its own (BLIP)."""
    seen: list[str] = []
    for name, module in modules.items():
        if name and not within(name, seen) and _output_embeddings(module) is not None:
            seen.append(name)
            yield from _head_of(name, module, modules, blocks)


def _beside_base_model(root: nn.Module, blocks: Sequence[str]) -> Iterator[str]:
    """A task model of transformers is a base model and, beside it, the head."""
    prefix = getattr(root, "base_model_prefix", "")
    if not isinstance(prefix, str) or not isinstance(root._modules.get(prefix), nn.Module):
        return
    for name, _ in root.named_children():
        # A second tower (for example a vision encoder) has blocks of its own, and a head has not.
        tower = sum(within(block, [name]) for block in blocks) > 1
        if name != prefix and not tower:
            yield name


def _conventional_head(root: nn.Module) -> Iterator[str]:
    for name, child in root.named_children():
        if name not in _HEAD_NAMES and not (name.endswith("_head") and is_linear(child)):
            continue
        inside = set(child.modules())
        others = (module for module in root.modules() if module not in inside)
        if any(is_linear(module) or is_convolution(module) for module in others):
            yield name


def _output_embeddings(root: nn.Module) -> nn.Module | None:
    """The output layer by transformers' own accessor, or None."""
    method = getattr(root, "get_output_embeddings", None)
    try:
        found = method() if callable(method) else None
    except (NotImplementedError, AttributeError):  # raised by transformers if a model has none
        return None
    return found if isinstance(found, nn.Module) else None
