"""Libraries that keep nn.Linear's weight in a tensor subclass: torchao and quanto."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .base import Packing, own_name, parts

_LIBRARIES = ("torchao", "optimum")


class TensorSubclass(Packing):
    """W is a tensor with a `dequantize` of its own. Every torch tensor has a method of that name, so the
    package of the tensor's class decides.
    """

    package = "torchao or quanto"

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        weight = module._parameters.get("weight")
        return isinstance(module, nn.Linear) and (
            type(weight).__module__.partition(".")[0] in _LIBRARIES
            or own_name(module) == ("optimum", "QLinear")
        )

    @classmethod
    def fault(cls, module: Any) -> str | None:
        if type(module.weight).__module__.partition(".")[0] not in _LIBRARIES:
            return "its weight is packed anew in every forward; call quanto.freeze(model) first"
        return None

    @classmethod
    def label(cls, module: Any) -> str:
        return type(module.weight).__name__

    @classmethod
    def details(cls, module: Any) -> str:
        """Returns the subclass's own description, which says whether inputs are quantised too."""
        return str(module.weight.__tensor_flatten__()[1])

    @classmethod
    def weight(cls, module: Any) -> Tensor:
        found: Tensor = module.weight.detach().dequantize()
        return found

    @classmethod
    def tensors(cls, module: Any) -> tuple[Tensor, ...]:
        return parts(module.weight)
