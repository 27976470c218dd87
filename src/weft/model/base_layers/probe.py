"""Tries a layer whose class, or instance, has a forward of its own: is it W x + bias, and does its
input get the gradient gᵀ W? An adapter rests on both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..swapped import OWN
from .base import INNER_FORWARD, ROUNDING, BaseLayer, own_class, own_forward

# What was found of the gradient, by the class and the other things that decide it.
_gradients: dict[tuple[Any, ...], str | None] = {}


def other_map(layer: BaseLayer, x: Tensor, wanted: Tensor) -> str | None:
    """Returns why a layer with a forward of its own is another map than W x + bias, or gives its
    input another gradient than gᵀ W; None if it does neither, or has no such forward.

    It is tried on x [n, in] (or ids [n]); `wanted` [n, out] is W x + bias. On the meta device
    nothing can be tried.
    """
    module, plain = layer.module, layer.plain()
    cls, own, W = own_class(module), _of_the_instance(module), layer.weight().detach()
    if own is None and plain is not None and cls.forward is plain.forward:
        return None
    if W.is_meta or 0 in W.shape:
        return None
    name = cls.__name__
    reason = f"the forward of {name} computes something else than a plain {layer.kind} layer"
    try:
        with torch.no_grad():
            found = _run(module, x)
    except Exception:  # it needs other arguments, or fails on them: it is not called as a plain one
        return reason
    if not isinstance(found, Tensor) or found.shape != wanted.shape:
        return reason
    if not close(found, wanted, W.dtype):
        return reason
    if not x.is_floating_point() or W.is_inference():
        return None
    if own is not None or plain is None:  # every parametrised layer has a class of its own
        return _other_gradient(module, name, x, W)
    key = (cls, module.training, W.dtype, W.device.type, type(W))
    if key not in _gradients:
        _gradients[key] = _other_gradient(module, name, x, W)
    return _gradients[key]


def affine_probe(layer: BaseLayer) -> tuple[Tensor, Tensor]:
    """Returns two inputs [2, in], one with a mean, and W x + bias [2, out] for them."""
    W = layer.weight().detach()
    x = torch.linspace(-1, 1, W.shape[1], dtype=W.dtype, device=W.device)
    x = torch.stack([x, x.flip(0) * x + 0.5])
    bias = layer.bias
    return x, x @ W.t() if bias is None else x @ W.t() + bias.detach()


def _of_the_instance(module: nn.Module) -> Any:
    """A forward that another library has put on the layer; if it is adapted, the one that it had."""
    return module.__dict__.get(INNER_FORWARD if hasattr(type(module), OWN) else "forward")


def _run(module: nn.Module, x: Tensor) -> Any:
    own = _of_the_instance(module)
    return own_forward(module, x) if own is None else own(x)


def _other_gradient(module: nn.Module, name: str, x: Tensor, W: Tensor) -> str | None:
    with torch.inference_mode(False), torch.enable_grad():
        x = x.clone().requires_grad_()
        y = _run(module, x)
        g = torch.linspace(0.5, 1.5, y.shape[-1], dtype=y.dtype, device=y.device).expand_as(y)
        found = (
            torch.autograd.grad(y, x, g.contiguous(), allow_unused=True)[0]
            if y.requires_grad
            else None
        )
    if found is None:
        return f"the forward of {name} gives its input no gradient, so nothing below would learn"
    if not close(found, g @ W, W.dtype):
        return f"the gradient that {name} gives its input is not that of W x, so what is below would learn wrongly"
    return None


def close(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> bool:
    """Whether two tensors [...] are roundings of the same numbers in this dtype."""
    return bool((found - wanted).abs().max() <= ROUNDING[dtype] * wanted.abs().max())
