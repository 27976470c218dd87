"""How a library stores the weight of a linear layer in fewer bits than a float: one class per library,
each in a file of this folder. Nothing here imports such a library; a layer is known by its class.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn


class Packing:
    """One way to store W. All methods take the layer, with or without adapters on it."""

    package: ClassVar[str]

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        """Returns True if a layer's weight is stored this way. Raises NotImplementedError here."""
        raise NotImplementedError

    @classmethod
    def fault(cls, module: nn.Module) -> str | None:
        """Returns why W cannot be read from this layer, or None."""
        return None

    @classmethod
    def prepare(cls, module: nn.Module) -> None:
        """Changes what keeps W from being read later. Called before the layer computes anything."""

    @classmethod
    def label(cls, module: nn.Module) -> str:
        """Returns a name of the format, for tables and messages: "NF4"."""
        return cls.package

    @classmethod
    def details(cls, module: nn.Module) -> str:
        """Returns what tells layers of one class and label apart that may compute differently."""
        return ""

    @classmethod
    def shape(cls, module: Any) -> tuple[int, int]:
        """Returns W's (out, in)."""
        return int(module.out_features), int(module.in_features)

    @classmethod
    def weight(cls, module: Any) -> Tensor:
        """Returns W [out, in] as floats, in new memory. Raises NotImplementedError here."""
        raise NotImplementedError

    @classmethod
    def tensors(cls, module: Any) -> tuple[Tensor, ...]:
        """Returns the tensors [...] that hold W. Raises NotImplementedError here."""
        raise NotImplementedError


def own_name(module: nn.Module) -> tuple[str, str]:
    """Returns the package and the name of the layer's class, without adapters."""
    cls = getattr(type(module), "_weft_base", type(module))
    return cls.__module__.partition(".")[0], cls.__name__


def parts(t: Tensor) -> tuple[Tensor, ...]:
    """Returns the plain tensors [...] that a tensor subclass consists of, or (t,)."""
    flatten = getattr(t, "__tensor_flatten__", None)
    if flatten is None:
        return (t,)
    return tuple(p for name in flatten()[0] for p in parts(getattr(t, name)))
