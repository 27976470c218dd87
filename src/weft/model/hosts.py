"""One view over the layers that can be adapted: nn.Linear, GPT-2's Conv1D, nn.Embedding.

All are linear maps W [out, in]. Conv1D stores W transposed; an embedding is the map of one-hot vectors, so its table
[num, dim] is W transposed too, with out = dim and in = num.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..methods.base import DTYPES
from ..ops import low_rank


def _is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D, without importing transformers: if nobody imported it, no module can be one."""
    library = sys.modules.get("transformers.pytorch_utils")
    return library is not None and isinstance(module, library.Conv1D)


def host_kind(module: nn.Module) -> str | None:
    """"linear", "conv1d" or "embedding"; None where the module is no linear map that Weft can adapt."""
    if why_not(module) is not None:
        return None
    return shape_kind(module)


def looks_linear(module: nn.Module) -> bool:
    """The module is a linear map of a class that Weft knows, whether or not it can be adapted."""
    return shape_kind(module) is not None


def shape_kind(module: nn.Module) -> str | None:
    """The kind by class alone: "linear", "embedding", "conv1d" or None."""
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.Embedding):
        return "embedding"
    return "conv1d" if _is_conv1d(module) else None


def why_not(module: nn.Module) -> str | None:
    """The reason why a layer that looks like a linear map cannot be adapted; None where it can, or is no such layer."""
    kind = shape_kind(module)
    if kind is None:
        return None
    if parametrize.is_parametrized(module):
        return "its weight is parametrised; call torch.nn.utils.parametrize.remove_parametrizations first"
    weight = module._parameters.get("weight")
    if weight is None:
        return "it has no weight parameter of its own"
    if weight.dtype not in DTYPES.values():
        return f"its weight is quantised ({str(weight.dtype).removeprefix('torch.')})"
    if weight.ndim != 2:
        return f"its weight has {weight.ndim} dimensions"
    if isinstance(module, torch.nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "MultiheadAttention reads its weight and never calls it, so an adapter would do nothing"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "max_norm rewrites its weight in every forward"
    return None


@dataclass(frozen=True, eq=False)
class HostView:
    """What a rule sees of a layer. `module` is kept outside nn.Module's bookkeeping on purpose."""

    module: nn.Module
    kind: str

    @property
    def transposed(self) -> bool:
        """The layer stores W as [in, out]."""
        return self.kind != "linear"

    def weight(self) -> Tensor:
        """W [out, in], a view."""
        stored: Tensor = self.module.weight  # type: ignore[assignment]
        return stored.t() if self.transposed else stored

    @property
    def out_features(self) -> int:
        return self.weight().shape[0]

    @property
    def in_features(self) -> int:
        return self.weight().shape[1]

    @property
    def bias(self) -> Tensor | None:
        """[out] or None; an embedding has none."""
        bias: Tensor | None = getattr(self.module, "bias", None)
        return bias

    def project(self, x: Tensor, A: Tensor, dropout: float, training: bool) -> Tensor:
        """x Aᵀ [..., r] for A [r, in]; x [..., in], or ids [...] where the layer is an embedding."""
        if isinstance(self.module, nn.Embedding):
            return low_rank.down_index(x, A, dropout, training, self.module.padding_idx)
        return low_rank.down(x, A, dropout, training)


def view(module: nn.Module) -> HostView:
    """The view of a layer for which `host_kind` is not None."""
    kind = host_kind(module)
    if kind is None:
        raise TypeError(f"{type(module).__name__} is no linear map that Weft adapts")
    return HostView(module, kind)
