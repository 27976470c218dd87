"""Weights that a module reads itself in its forward instead of calling a layer: those of
nn.MultiheadAttention, of recurrent layers, nn.Bilinear, and the matrices of a model's own modules.

There W' itself stands in the weight's place while the module runs (model/held.py): exact for every
method that changes weights, and slower than a layer, since W' [out, in] is built in every forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ...methods.base import LowRankMethod, PromptMethod
from .base import BaseLayer, dtype_fault, own_class

KIND = "weight"
OUT_PROJ = "out_proj"
_OF_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_Unread = torch.nn.modules.linear.NonDynamicallyQuantizableLinear


@dataclass(frozen=True, eq=False)
class HeldWeight:
    """The place of a weight in a model, where a layer would have its module: the parameter `tensor`
    of `holder`, which the forward of `host` reads. `slot`: its name among the weights of the host.
    """

    host: nn.Module
    holder: nn.Module
    tensor: str
    slot: str
    of_root: bool = False

    @property
    def training(self) -> bool:
        """Whether the host is in training mode."""
        return self.host.training

    @property
    def is_linear_map(self) -> bool:
        """Whether it is known to be the weight of a linear map, one of an attention."""
        return isinstance(self.host, nn.MultiheadAttention)


class HeldLayer(BaseLayer):
    """W [out, in] of a `HeldWeight`; a weight of three dimensions is seen as [out, in1 * in2]."""

    kind = KIND
    hosted = True

    def __init__(self, held: Any) -> None:
        super().__init__(held.holder)
        self.tensor: str = held.tensor
        self._slot: str = held.slot
        self._host: nn.Module = held.host

    @classmethod
    def matches(cls, module: Any) -> bool:
        return isinstance(module, HeldWeight)

    @classmethod
    def why_not(cls, module: Any) -> str | None:
        host, stored = module.host, module.holder._parameters.get(module.tensor)
        name = own_class(host).__name__
        if isinstance(host, torch.jit.ScriptModule):
            return f"{name} is compiled by TorchScript, in which nothing can take its place"
        if module.of_root:
            return (
                f"{name}, the model itself, reads it, and may do so outside of its forward, where the "
                "adapter would do nothing"
            )
        if parametrize.is_parametrized(module.holder, module.tensor):
            return (
                "it is parametrised; call torch.nn.utils.parametrize.remove_parametrizations first"
            )
        if stored is None:
            return f"it is no parameter of {name}"
        if nn.parameter.is_lazy(stored):
            return "its shape is not known before its first forward; run the model once"
        if dtype_fault(stored) is not None:
            return f"it is quantised ({str(stored.dtype).removeprefix('torch.')})"
        return None

    @property
    def host(self) -> nn.Module:
        return self._host

    @property
    def slot(self) -> str:
        return self._slot

    def full_name(self, layer: str) -> str:
        """Returns the name of the parameter; an attention's output map has the name of its module."""
        return layer if self.module is self.host else f"{layer}.{self.tensor}"

    @property
    def parameter(self) -> Tensor:
        """The weight as it is stored [out, ...], whatever stands in for it."""
        return self.module._parameters[self.tensor]  # type: ignore[return-value]

    def weight(self) -> Tensor:
        """Returns W [out, in], a view."""
        return self.matrix(self.parameter)

    def matrix(self, stored: Tensor) -> Tensor:
        return stored.flatten(1)

    def stored(self, W: Tensor) -> Tensor:
        return W.reshape(self.parameter.shape)

    @property
    def bias(self) -> Tensor | None:
        """None: whatever the host adds is no part of this map."""
        return None

    @property
    def fallback_reason(self) -> str | None:
        return f"{own_class(self.host).__name__} reads this weight itself"


def held_fault(site: HeldWeight, method: Any) -> str | None:
    """Returns why a method cannot adapt a weight that its module reads itself, or None."""
    host, name = own_class(site.host).__name__, type(method).__name__
    if isinstance(method, PromptMethod):
        return None
    if not isinstance(method, LowRankMethod):
        return (
            f"{host} reads this weight itself, and {name} acts on the input and output of a layer; "
            "methods that change weights (LoRA, DoRA, VeRA, ...) can adapt it"
        )
    if method.dropout:
        return (
            f"{host} reads this weight itself, so {name}'s dropout={method.dropout} has no input of the "
            "low-rank branch to act on; set dropout to 0 there, or exclude it"
        )
    return None


def held_weights(name: str, module: nn.Module) -> dict[str, HeldWeight]:
    """Returns the weights that a module of no known kind reads itself, by name: that of the
    parameter, but the name of the module for the output map of an attention.
    """
    if isinstance(module, nn.MultiheadAttention):
        return dict(_of_attention(name, module))
    if isinstance(module, parametrize.ParametrizationList):
        return {}
    dims, found = (2, 3) if isinstance(module, nn.Bilinear) else (2,), {}
    for tensor, p in module._parameters.items():
        given: Tensor | None = p  # None if it was registered so
        if given is None or nn.parameter.is_lazy(given) or given.ndim not in dims:
            continue
        if given.is_floating_point() and min(given.shape) > 1:
            full = f"{name}.{tensor}".lstrip(".")
            found[full] = HeldWeight(module, module, tensor, tensor, not name)
    return found


def _of_attention(name: str, module: nn.MultiheadAttention) -> Iterator[tuple[str, HeldWeight]]:
    for tensor in _OF_ATTENTION:
        if module._parameters.get(tensor) is not None or parametrize.is_parametrized(
            module, tensor
        ):
            full = f"{name}.{tensor}".lstrip(".")
            yield full, HeldWeight(module, module, tensor, tensor)
    out = module._modules.get(OUT_PROJ)
    if isinstance(out, _Unread):
        yield f"{name}.{OUT_PROJ}".lstrip("."), HeldWeight(module, out, "weight", OUT_PROJ)
