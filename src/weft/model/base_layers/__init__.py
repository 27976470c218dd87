"""The kinds of layers that can be adapted. A new kind is a file in this folder and a line here."""

from __future__ import annotations

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
)


def kind_of(module: nn.Module) -> type[BaseLayer] | None:
    """Returns the class of a layer by the module's class alone, adaptable or not; None for others."""
    return next((kind for kind in KINDS if kind.matches(module)), None)


def has_map(module: nn.Module) -> bool:
    """Whether a module is a linear map of a kind that Weft knows, embeddings and convolutions included."""
    kind = kind_of(module)
    return kind is not None and kind.has_weight


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear map of vectors: no embedding, no norm, no convolution."""
    kind = kind_of(module)
    return kind is not None and kind.has_weight and not kind.takes_ids and not kind.is_convolution


def is_convolution(module: nn.Module) -> bool:
    """Whether a module is a convolution, adaptable or not."""
    kind = kind_of(module)
    return kind is not None and kind.is_convolution


def why_not(module: nn.Module) -> str | None:
    """Returns why a layer of a known kind cannot be adapted; None if it can, or is of no known kind."""
    kind = kind_of(module)
    return None if kind is None else kind.why_not(module)


def view(module: nn.Module) -> BaseLayer:
    """Returns the view of a layer. Raises TypeError if it cannot be adapted."""
    kind = kind_of(module)
    if kind is None or kind.why_not(module) is not None:
        raise TypeError(f"{type(module).__name__} cannot be adapted")
    return kind(module)


__all__ = [
    "INNER_FORWARD",
    "KINDS",
    "BaseLayer",
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
