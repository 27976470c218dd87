"""The view of a layer that adapters get: one class per kind of layer, each in a file of this
folder.

All kinds but norms are linear maps W [out, in]. The class defines how the layer stores W and reads
its input; the rest of Weft never compares kinds by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from ...methods.config import DTYPES
from ...ops import native, projection
from ...ops.convolution import Geometry
from ...ops.low_rank import LowRank
from ..swapped import OWN

INNER_FORWARD = "_weft_inner_forward"  # a forward found on the instance (accelerate's hooks)

# Largest relative distance from W x + bias that counts as another rounding of the same number.
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def own_class(module: nn.Module) -> type[nn.Module]:
    """Returns the layer's own class, adapted or not."""
    found: type[nn.Module] = getattr(type(module), OWN, type(module))
    return found


def own_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """Returns the output [..., out] that a layer computes without adapters, adapted or not."""
    inner = module.__dict__.get(INNER_FORWARD)
    if inner is not None:
        found: Tensor = inner(*args, **kwargs)
        return found
    y: Tensor = own_class(module).forward(module, *args, **kwargs)
    return y


def input_of(kwargs: Mapping[str, Any]) -> Tensor:
    """Returns a layer's input [..., in], of arguments that were given by name, in any order."""
    found: Tensor = kwargs["input"] if "input" in kwargs else next(iter(kwargs.values()))
    return found


class BaseLayer:
    """One layer of the base model. See methods/base.py for the protocol that methods rely on."""

    kind: ClassVar[str]  # a name for tables and files
    takes_ids: ClassVar[bool] = False  # the input holds ids: the map of one-hot vectors
    transposed: ClassVar[bool] = False  # W is stored as [in, out]
    has_weight: ClassVar[bool] = True  # there is a weight matrix
    geometry: Geometry | None = None  # what a kernel means; of a convolution only
    is_convolution: ClassVar[bool] = False  # its channels come before positions, which it mixes
    hosted: ClassVar[bool] = False  # another module reads W itself: see held.py
    tensor: str = "weight"  # the name of W in the module

    def __init__(self, module: Any) -> None:
        self.module: nn.Module = module

    @property
    def host(self) -> nn.Module:
        """The module in whose forward the adapters act, which also carries their tensors."""
        return self.module

    @classmethod
    def matches(cls, module: Any) -> bool:
        """Returns True if a module is of this kind, by its class alone. Raises NotImplementedError
        here.
        """
        raise NotImplementedError

    @classmethod
    def plain(cls) -> type[nn.Module] | None:
        """Returns the class whose forward is W x + bias and nothing else, if there is one."""
        return None

    @classmethod
    def why_not(cls, module: Any) -> str | None:
        """Returns the reason why a module of this kind cannot be adapted, or None."""
        return weight_fault(module)

    @classmethod
    def tensors_of(cls, module: Any) -> tuple[str, ...]:
        """Returns the parameters that are layers of their own, named after them; empty if the
        module is one layer and has its name.
        """
        return ()

    @property
    def stack(self) -> int | None:
        """The number of weights that are stored as one, [stack, out, in]; None for a layer of one."""
        return None

    @property
    def parameter(self) -> Tensor:
        """The parameter [...] that stores W, as it is laid out."""
        found: Tensor = getattr(self.module, self.tensor)
        return found

    @property
    def slot(self) -> str | None:
        """The name of the layer within its module, if the module has several; None if it is one."""
        return None if self.stack is None else self.tensor

    @property
    def key(self) -> Any:
        """What tells the layer apart from all others: its module, with the parameter if it is one
        of several layers.
        """
        return self.module if self.slot is None else (self.module, self.tensor)

    def full_name(self, layer: str) -> str:
        """Returns the name of the parameter that stores W, for the layer's name."""
        return (layer if self.stack is not None else f"{layer}.{self.tensor}").lstrip(".")

    def weight(self) -> Tensor:
        """Returns W [out, in], a view; for a norm, which has none, the gain [out]."""
        stored: Tensor = self.module.weight  # type: ignore[assignment]
        return self.matrix(stored)

    def matrix(self, stored: Tensor) -> Tensor:
        """Returns W [out, in] for a tensor that is laid out as the layer's weight."""
        return stored.t() if self.transposed else stored

    def stored(self, W: Tensor) -> Tensor:
        """Returns W [out, in] as the layer stores its weight: undoes `matrix`."""
        return W.t() if self.transposed else W

    @property
    def is_view(self) -> bool:
        """Whether `weight` returns the memory of the weight itself, and no copy."""
        return True

    @property
    def out_features(self) -> int:
        return self.weight().shape[0]

    @property
    def in_features(self) -> int:
        return self.weight().shape[-1]

    @property
    def device(self) -> torch.device:
        return self.weight().device

    @property
    def bias(self) -> Tensor | None:
        """[out] or None; an embedding has none."""
        bias: Tensor | None = getattr(self.module, "bias", None)
        return bias

    @property
    def not_mergeable(self) -> str | None:
        """Why W' cannot be written into the layer, or None."""
        return None

    @property
    def packed_as(self) -> str | None:
        """The name of the format that W is packed in; None if it is stored as it is."""
        return None

    def codes(self) -> tuple[Tensor, ...] | None:
        """Returns the tensors [...] that W is unpacked from at every read; None if W is stored as
        it is.
        """
        return None

    def feature_dims(self, x: Tensor, y: Tensor) -> int:
        """Returns how many of the last dimensions of the input x are no positions, given the output
        y [..., out]: none of ids, one of vectors.
        """
        return x.dim() + 1 - y.dim()

    def adapted(
        self, x: Tensor, y: Tensor, f: LowRank, norm: Tensor | None, dropout: float
    ) -> Tensor:
        """Returns the output [..., out] with an update from the layer's input x and own output y:
        the general definition. `norm` is ‖W + ΔW‖ [out] if f has an m.
        """
        h = self.down(x, f.A, dropout, dtype=y.dtype)
        return native.adapted(y, h, self.bias, f, norm)

    def change(
        self, x: Tensor, y: Tensor, f: LowRank, norm: Tensor | None, dropout: float
    ) -> Tensor:
        """Returns `adapted` - y [..., out], without the cancellation of that difference."""
        h = self.down(x, f.A, dropout, dtype=y.dtype)
        return native.change(y, h, self.bias, f, norm)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the layer's own output [..., out] for another input, without any adapter."""
        return own_forward(self.module, x)

    def of_rows(self, x: Tensor, rows: Tensor, bias: Tensor | None = None) -> Tensor:
        """Returns what the layer itself would compute if `rows` [n, width] were its table, or its W
        with the bias [n]: [..., width] for places x [...], or [..., n] for x [..., width].
        """
        cls = own_class(self.module)
        if cls.forward is nn.Embedding.forward:
            return functional.embedding(x, rows)
        if cls.forward is nn.Linear.forward:
            return functional.linear(x, rows, bias)
        twin, own = cls.__new__(cls), self.module.__dict__
        stored = rows if self.takes_ids or not self.transposed else rows.t()
        twin.__dict__.update(own, _parameters={"weight": stored, "bias": bias})
        if self.takes_ids:  # no row without gradient, and no sparse gradients
            twin.__dict__.update(padding_idx=None, sparse=False)
        found: Tensor = cls.forward(twin, x)
        return found

    def down(
        self, x: Tensor, A: Tensor, dropout: float = 0.0, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Returns dropout(x) Aᵀ [..., r] in `dtype` (None: A's own) for A [r, in]."""
        return projection.down(x, A, dropout, dtype=dtype)

    @property
    def fallback_reason(self) -> str | None:
        """Why only the layer itself may compute its output; None if its class does just W x + bias."""
        if INNER_FORWARD in self.module.__dict__:
            return "another library has put its own forward on the layer"
        plain, cls = self.plain(), own_class(self.module)
        if plain is None or cls.forward is not plain.forward:
            return f"{cls.__name__} has a forward of its own"
        return None


def weight_fault(module: nn.Module, ndim: int = 2) -> str | None:
    """Returns why a weight with that many dimensions cannot be adapted, or None."""
    if parametrize.is_parametrized(module):
        return (
            "its weight is parametrised; call "
            "torch.nn.utils.parametrize.remove_parametrizations first"
        )
    weight = module._parameters.get("weight")
    if weight is None:
        return "it has no weight parameter of its own"
    if isinstance(weight, nn.parameter.UninitializedParameter):
        return "its shape is not known before its first forward; run the model once"
    if dtype_fault(weight) is not None:
        return f"its weight is quantised ({str(weight.dtype).removeprefix('torch.')})"
    bias = module._parameters.get("bias")
    if bias is not None and dtype_fault(bias) is not None:
        return f"its bias is quantised ({str(bias.dtype).removeprefix('torch.')})"
    if weight.ndim != ndim:
        return f"its weight has {weight.ndim} dimensions"
    return None


def dtype_fault(t: Tensor) -> str | None:
    """Returns why a tensor [...] of its dtype can neither train nor be adapted, or None."""
    if t.dtype in DTYPES.values():
        return None
    return f"{str(t.dtype).removeprefix('torch.')}, which cannot train"
