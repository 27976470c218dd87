"""The kinds of layers that can be adapted. A new kind is a file in this folder and a line here."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from .base import (
    INNER_FORWARD,
    BaseLayer,
    dtype_fault,
    input_of,
    own_class,
    own_forward,
    weight_fault,
)
from .conv1d import Conv1DLayer
from .convolution import ConvolutionLayer
from .embedding import EmbeddingLayer
from .experts import ExpertsLayer
from .linear import LinearLayer
from .norm import NormLayer, is_norm
from .packed import PackedLayer

# The first that matches: a packed layer may be an nn.Linear too.
KINDS: tuple[type[BaseLayer], ...] = (
    PackedLayer,
    LinearLayer,
    EmbeddingLayer,
    Conv1DLayer,
    ConvolutionLayer,
    NormLayer,
    ExpertsLayer,
)


def kind_of(module: nn.Module) -> type[BaseLayer] | None:
    """Returns the class of a layer by the module's class alone, adaptable or not; None for others."""
    return next((kind for kind in KINDS if kind.matches(module)), None)


def has_map(module: nn.Module) -> bool:
    """Whether a module is a linear map of a kind that Weft knows, embeddings and convolutions included."""
    kind = kind_of(module)
    return kind is not None and kind.has_weight and not kind.tensors_of(module)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear map of vectors: no embedding, no norm, no convolution."""
    kind = kind_of(module)
    return kind is not None and has_map(module) and not kind.takes_ids and not kind.is_convolution


def is_convolution(module: nn.Module) -> bool:
    """Whether a module is a convolution, adaptable or not."""
    kind = kind_of(module)
    return kind is not None and kind.is_convolution


def why_not(module: nn.Module) -> str | None:
    """Returns why a layer of a known kind cannot be adapted; None if it can, or is of no known kind."""
    kind = kind_of(module)
    return None if kind is None else kind.why_not(module)


def view(module: nn.Module, name: str = "") -> BaseLayer:
    """Returns the view of the layer with this name; `module` is the module, or that of a parameter
    which is a layer. Raises TypeError if it cannot be adapted.
    """
    kind = kind_of(module)
    if kind is None or kind.why_not(module) is not None:
        raise TypeError(f"{type(module).__name__} cannot be adapted")
    tensors = kind.tensors_of(module)
    if not tensors:
        return kind(module)
    tensor = name.rpartition(".")[2]
    if tensor not in tensors:
        raise TypeError(f"{type(module).__name__} has several layers: {list(tensors)}")
    return ExpertsLayer(module, tensor)


def carriers(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Returns these modules by name, and beside them, by the name of every parameter that is a layer,
    the module that has it.
    """
    found: dict[str, nn.Module] = {}
    for name, module in modules.items():
        found[name] = module
        kind = kind_of(module)
        for tensor in () if kind is None else kind.tensors_of(module):
            found[f"{name}.{tensor}".lstrip(".")] = module
    return found


__all__ = [
    "INNER_FORWARD",
    "KINDS",
    "BaseLayer",
    "ExpertsLayer",
    "carriers",
    "dtype_fault",
    "has_map",
    "input_of",
    "is_convolution",
    "is_linear",
    "is_norm",
    "kind_of",
    "own_class",
    "own_forward",
    "view",
    "weight_fault",
    "why_not",
]
