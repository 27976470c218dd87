"""How a library stores the weight of a linear layer in fewer bits than a float: one class per
library, each in a file of this folder. Nothing here imports such a library; a layer is known by its
class.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

# Where a module keeps its packed layer while an adapter is merged into it (packed_merge.py).
SHADOW = "_weft_packed"


class Packing:
    """One way to store W. All methods take the layer, with or without adapters on it."""

    package: ClassVar[str]
    parameter: ClassVar[str] = "weight"  # the name of the one that holds the codes
    holds: ClassVar[tuple[str, ...]] = ()  # attributes of the layer that hold parts of W, too

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

    @classmethod
    def dtype(cls, module: Any) -> torch.dtype:
        """Returns the dtype of `weight`, without unpacking it. Raises NotImplementedError here."""
        raise NotImplementedError

    @classmethod
    def computes_in(cls, module: Any) -> torch.dtype:
        """Returns the dtype whose rounding the layer's output has."""
        found = getattr(module, "compute_dtype", None)
        return found if isinstance(found, torch.dtype) else cls.dtype(module)

    @classmethod
    def why_not_pack(cls, module: Any) -> str | None:
        """Returns why another W cannot be packed like this layer's, or None."""
        return f"Weft cannot pack as {cls.package} does"

    @classmethod
    def pack(cls, module: Any, W: Tensor) -> None:
        """Packs W [out, in] as the layer's weight is, and gives it the new codes. The old ones are
        not written to. Raises NotImplementedError here.
        """
        raise NotImplementedError


def own_class(module: nn.Module) -> type[nn.Module]:
    """Returns the layer's class, without adapters."""
    found: type[nn.Module] = getattr(type(module), "_weft_base", type(module))
    return found


def own_name(module: nn.Module) -> tuple[str, str]:
    """Returns the package and the name of the layer's class, without adapters."""
    cls = own_class(module)
    return cls.__module__.partition(".")[0], cls.__name__


def parts(t: Tensor) -> tuple[Tensor, ...]:
    """Returns the plain tensors [...] that a tensor subclass consists of, or (t,)."""
    flatten = getattr(t, "__tensor_flatten__", None)
    if flatten is None:
        return (t,)
    return tuple(p for name in flatten()[0] for p in parts(getattr(t, name)))
