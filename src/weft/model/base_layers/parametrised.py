"""nn.Linear whose weight torch.nn.utils.parametrize makes: weight norm, orthogonal, spectral norm.

The layer computes its own output, with the weight that its parametrisation makes at every read; the
adapter acts beside it. DoRA reads W once more per forward.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .base import BaseLayer, dtype_fault, own_class
from .linear import LinearLayer
from .probe import affine_probe, close, other_map


class ParametrisedLayer(BaseLayer):
    """y = W x + bias, W made from other parameters."""

    kind = "linear"

    @classmethod
    def matches(cls, module: Any) -> bool:
        return LinearLayer.matches(module) and parametrize.is_parametrized(module, "weight")

    @classmethod
    def why_not(cls, module: Any) -> str | None:
        if parametrize.is_parametrized(module, "bias"):
            return "its bias is parametrised"
        if any(dtype_fault(p) is not None for p in module.parameters(recurse=False)):
            return "its bias is quantised"
        if any(p.is_meta for p in module.parametrizations.parameters()):
            return None
        layer = cls(_twin(module))
        if layer.weight().shape != (module.out_features, module.in_features):
            return "its parametrisation makes a weight of another shape"
        with torch.no_grad():
            # Spectral norm takes a step in every forward of training, so W is that of the last one.
            y, (x, wanted) = layer.forward(affine_probe(layer)[0]), affine_probe(layer)
        if not close(y, wanted, y.dtype):
            return "its forward is not W x + bias with the weight that its parametrisation makes"
        layer.module.eval()
        return other_map(layer, x, affine_probe(layer)[1])

    def weight(self) -> Tensor:
        """Returns W [out, in] as the last forward has made it."""
        module: Any = self.module
        with _in_eval(module.parametrizations):
            found: Tensor = module.weight
        return found

    @property
    def parameter(self) -> Tensor:
        """What is made of the parameters: none holds W."""
        return self.weight()

    @property
    def out_features(self) -> int:
        return int(self.module.out_features)  # type: ignore[arg-type]

    @property
    def in_features(self) -> int:
        return int(self.module.in_features)  # type: ignore[arg-type]

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def is_view(self) -> bool:
        return False

    @property
    def fallback_reason(self) -> str | None:
        return "its weight is parametrised"

    @property
    def not_mergeable(self) -> str | None:
        return (
            "its weight is parametrised, so W' cannot be written into it. Call "
            "torch.nn.utils.parametrize.remove_parametrizations on a model without adapters, load the "
            "adapter onto it, and merge there"
        )


def _twin(module: nn.Module) -> nn.Module:
    """A copy of the layer without its adapters, whose buffers may change."""
    cls = own_class(module)
    found = cls.__new__(cls)
    found.__dict__.update(module.__dict__)
    found._modules = {"parametrizations": copy.deepcopy(module._modules["parametrizations"])}
    return found


@contextmanager
def _in_eval(module: nn.Module) -> Iterator[None]:
    """Inside this context the parametrisations leave their buffers as they are."""
    before = [(m, m.training) for m in module.modules()]
    for m, _ in before:
        m.training = False
    try:
        yield
    finally:
        for m, training in before:
            m.training = training
