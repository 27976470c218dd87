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
from .held import HeldLayer, HeldWeight, held_fault, held_weights
from .linear import LinearLayer
from .norm import NormLayer, is_norm
from .packed import PackedLayer
from .parametrised import ParametrisedLayer

Site = nn.Module | HeldWeight  # what an adapter's layer is attached to

# The first that matches: a packed layer may be an nn.Linear too.
KINDS: tuple[type[BaseLayer], ...] = (
    HeldLayer,
    PackedLayer,
    ParametrisedLayer,
    LinearLayer,
    EmbeddingLayer,
    Conv1DLayer,
    ConvolutionLayer,
    NormLayer,
    ExpertsLayer,
)


def kind_of(module: Site) -> type[BaseLayer] | None:
    """Returns the class of a layer by the module's class alone, adaptable or not; None for others."""
    return next((kind for kind in KINDS if kind.matches(module)), None)


def has_map(module: Site) -> bool:
    """Whether a module is a linear map of a kind that Weft knows, embeddings and convolutions
    included.
    """
    kind = kind_of(module)
    return kind is not None and kind.has_weight and not kind.tensors_of(module)


def is_linear(module: Site) -> bool:
    """Whether a module is a linear map of vectors: no embedding, no norm, no convolution."""
    kind = kind_of(module)
    return kind is not None and has_map(module) and not kind.takes_ids and not kind.is_convolution


def is_convolution(module: Site) -> bool:
    """Whether a module is a convolution, adaptable or not."""
    kind = kind_of(module)
    return kind is not None and kind.is_convolution


def why_not(module: Site) -> str | None:
    """Returns why a layer of a known kind cannot be adapted; None if it can, or is of no known
    kind.
    """
    kind = kind_of(module)
    return None if kind is None else kind.why_not(module)


def view(module: Site, name: str = "") -> BaseLayer:
    """Returns the view of the layer with this name; `module` is the module, or that of a parameter
    which is a layer. Raises TypeError if it cannot be adapted.
    """
    kind = kind_of(module)
    if kind is None or kind.why_not(module) is not None:
        raise TypeError(f"{type(module).__name__} cannot be adapted")
    if isinstance(module, HeldWeight):
        return HeldLayer(module)
    tensors = kind.tensors_of(module)
    if not tensors:
        return kind(module)
    tensor = name.rpartition(".")[2]
    if tensor not in tensors:
        raise TypeError(f"{type(module).__name__} has several layers: {list(tensors)}")
    return ExpertsLayer(module, tensor)


def carriers(modules: Mapping[str, nn.Module]) -> dict[str, Site]:
    """Returns these modules by name, and beside each, by the name of every parameter that is a
    layer, the module that has it, or the weight that it reads itself.
    """
    found: dict[str, Site] = {}
    for name, module in modules.items():
        found.setdefault(name, module)
        kind = kind_of(module)
        for tensor in () if kind is None else kind.tensors_of(module):
            found[f"{name}.{tensor}".lstrip(".")] = module
        if kind is None:
            found |= held_weights(name, module)
    return found


def carrier(site: Site) -> nn.Module:
    """Returns the module that carries the adapters of a site: the layer, or the host of a weight."""
    return site.host if isinstance(site, HeldWeight) else site


def holder(site: Site, name: str = "") -> tuple[nn.Module, str]:
    """Returns the module that holds the weight of the site of that name, and the weight's name in
    it.
    """
    if isinstance(site, HeldWeight):
        return site.holder, site.tensor
    kind, own = kind_of(site), name.rpartition(".")[2]
    several = kind is not None and own in kind.tensors_of(site)
    return site, own if several else "weight"


__all__ = [
    "INNER_FORWARD",
    "KINDS",
    "BaseLayer",
    "ExpertsLayer",
    "HeldWeight",
    "Site",
    "carrier",
    "carriers",
    "dtype_fault",
    "has_map",
    "held_fault",
    "held_weights",
    "holder",
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
