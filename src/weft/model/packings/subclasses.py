"""Libraries that keep nn.Linear's weight in a tensor subclass: torchao and quanto."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from .base import Packing, own_name, parts

_LIBRARIES = ("torchao", "optimum")


class TensorSubclass(Packing):
    """W is a tensor with a `dequantize` of its own. Every torch tensor has a method of that name,
    so the package of the tensor's class decides.
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
        if getattr(module, "activation_qtype", None) is not None:
            return (
                "it rounds its inputs and outputs to few bits, the adapter's with them; quantise the "
                "weights only (activations=None)"
            )
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
        """Returns W [out, in]."""
        found: Tensor = module.weight.detach().dequantize()
        return found

    @classmethod
    def tensors(cls, module: Any) -> tuple[Tensor, ...]:
        """Returns the tensors [...] that hold W."""
        return parts(module.weight)

    @classmethod
    def dtype(cls, module: Any) -> torch.dtype:
        found: torch.dtype = module.weight.dtype  # of the numbers that it stands for
        return found

    @classmethod
    def why_not_pack(cls, module: Any) -> str | None:
        kind = type(module.weight).__name__
        if own_name(module)[0] == "optimum" or kind in _FROM_FLOAT:
            return None
        return f"Weft cannot pack a {kind} anew"

    @classmethod
    def pack(cls, module: Any, W: Tensor) -> None:
        """Packs W [out, in] into the layer."""
        old = module.weight
        W = W.to(old.dtype)
        if own_name(module)[0] == "optimum":
            module.weight = nn.Parameter(W, requires_grad=False)
            module.freeze()
            return
        new = _FROM_FLOAT[type(old).__name__](type(old), W, old)
        module.weight = nn.Parameter(new, requires_grad=False)


def _granularity(W: Tensor, block: Any) -> Any:
    """torchao's word for blocks of the shape [rows, columns] of W."""
    found = import_module("torchao.quantization.granularity")
    if tuple(block) == tuple(W.shape):
        return found.PerTensor()
    return found.PerRow() if block[1] == W.shape[1] else found.PerGroup(block[1])


def _int8(cls: Any, W: Tensor, old: Any) -> Tensor:
    found: Tensor = cls.from_hp(W, granularity=_granularity(W, old.block_size))
    return found


def _float8(cls: Any, W: Tensor, old: Any) -> Tensor:
    found: Tensor = cls.from_hp(
        W,
        float8_dtype=old.qdata.dtype,
        granularity=_granularity(W, old.block_size),
        mm_config=old.mm_config,
        kernel_preference=old.kernel_preference,
    )
    return found


def _intx(cls: Any, W: Tensor, old: Any) -> Tensor:
    found: Tensor = cls.from_hp(W, list(old.block_size), old.target_dtype)
    return found


_FROM_FLOAT = {"Int8Tensor": _int8, "Float8Tensor": _float8, "IntxUnpackedToInt8Tensor": _intx}
