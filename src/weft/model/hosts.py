"""One view over the layers that can be adapted: nn.Linear, GPT-2's Conv1D, nn.Embedding; and layer
norms.

All are linear maps W [out, in]. Conv1D stores W transposed; an embedding is the map of one-hot
vectors, so its table [num, dim] is W transposed too, with out = dim and in = num. A norm is no
linear map: it hosts rules that compute something beside a layer and turn no weight.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..methods.base import DTYPES
from ..ops import low_rank

INNER_FORWARD = (
    "_weft_inner_forward"  # a forward that was on the instance (accelerate's hooks) when we came
)


def own_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """What a layer computes by itself, adapted or not."""
    inner = module.__dict__.get(INNER_FORWARD)
    base = getattr(type(module), "_weft_base", type(module))
    y: Tensor = (
        inner(*args, **kwargs) if inner is not None else base.forward(module, *args, **kwargs)
    )
    return y


def _is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D, without importing transformers: if nobody imported it, no module can be
    one.
    """
    library = sys.modules.get("transformers.pytorch_utils")
    return library is not None and isinstance(module, library.Conv1D)


def host_kind(module: nn.Module) -> str | None:
    """ "linear", "conv1d", "embedding" or "norm"; None where the module is nothing that Weft can
    adapt.
    """
    if why_not(module) is not None:
        return None
    return shape_kind(module) or ("norm" if is_norm(module) else None)


def is_norm(module: nn.Module, width: int | None = None) -> bool:
    """A layer norm or RMS norm with a gain, of torch or of a model's own; of this width, where one
    is given.
    """
    name, weight = type(module).__name__.lower(), module._parameters.get("weight")
    if "norm" not in name or any(other in name for other in ("batch", "group", "instance")):
        return False
    return weight is not None and weight.ndim == 1 and width in (None, weight.shape[0])


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
    """The reason why a layer that looks like a linear map cannot be adapted; None where it can, or
    is no such layer.
    """
    kind = shape_kind(module)
    if kind is None:
        return None
    if parametrize.is_parametrized(module):
        return "its weight is parametrised; call torch.nn.utils.parametrize.remove_parametrizations first"
    weight = module._parameters.get("weight")
    if weight is None:
        return "it has no weight parameter of its own"
    if isinstance(weight, nn.parameter.UninitializedParameter):
        return "its shape is not known before its first forward; run the model once"
    if weight.dtype not in DTYPES.values():
        return f"its weight is quantised ({str(weight.dtype).removeprefix('torch.')})"
    if weight.ndim != 2:
        return f"its weight has {weight.ndim} dimensions"
    if isinstance(module, torch.nn.modules.linear.NonDynamicallyQuantizableLinear):
        return (
            "MultiheadAttention reads its weight and never calls it, so an adapter would do nothing"
        )
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "max_norm rewrites its weight in every forward"
    if not _computes_its_map(module, kind):
        return f"the forward of {type(module).__name__} computes something else than a plain {kind} layer"
    return None


_PLAIN: dict[str, type[nn.Module]] = {"linear": nn.Linear, "embedding": nn.Embedding}
# Largest relative distance from W x + bias that counts as another rounding of the same number.
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def _computes_its_map(module: nn.Module, kind: str) -> bool:
    """False where a subclass has a forward of its own (a scaled embedding, shifted positions) and
    it is another map.

    Such a layer is asked: one input, held against W x + bias. On the meta device nothing can be
    asked.
    """
    cls = getattr(type(module), "_weft_base", type(module))
    plain = _PLAIN[kind] if kind in _PLAIN else sys.modules["transformers.pytorch_utils"].Conv1D
    weight: Tensor = module.weight  # type: ignore[assignment]
    if cls.forward is plain.forward or weight.is_meta or 0 in weight.shape:
        return True
    W = weight.detach() if kind == "linear" else weight.detach().t()
    if kind == "embedding":
        x = torch.arange(min(3, W.shape[1]), device=W.device)
        wanted = W.t()[x]
    else:
        x = torch.linspace(-1, 1, W.shape[1], dtype=W.dtype, device=W.device)[None]
        bias = getattr(module, "bias", None)
        wanted = x @ W.t() if bias is None else x @ W.t() + bias.detach()
    try:
        with torch.no_grad():
            found = cls.forward(module, x)
    # it wants other arguments, or fails on them: whatever it is, it is not asked as a plain layer
    # is
    except Exception:
        return False
    if not isinstance(found, Tensor) or found.shape != wanted.shape:
        return False
    return bool((found - wanted).abs().max() <= _ROUNDING[W.dtype] * wanted.abs().max())


@dataclass(frozen=True, eq=False)
class HostView:
    """What a rule sees of a layer. `module` is kept outside nn.Module's bookkeeping on purpose."""

    module: nn.Module
    kind: str

    @property
    def transposed(self) -> bool:
        """The layer stores W as [in, out]."""
        return self.kind in ("conv1d", "embedding")

    def weight(self) -> Tensor:
        """W [out, in], a view; of a norm, which has none, the gain [out]."""
        stored: Tensor = self.module.weight  # type: ignore[assignment]
        return stored.t() if self.transposed else stored

    @property
    def out_features(self) -> int:
        return self.weight().shape[0]

    @property
    def in_features(self) -> int:
        return self.weight().shape[-1]

    @property
    def device(self) -> torch.device:
        return self.weight().device

    def run(self, x: Tensor) -> Tensor:
        """The layer's own output for another input, without any adapter."""
        return own_forward(self.module, x)

    @property
    def why_plain(self) -> str | None:
        """Why nobody but the layer itself may compute W x + bias; None where its class is known to
        do just that.
        """
        cls = getattr(type(self.module), "_weft_base", type(self.module))
        if INNER_FORWARD in self.module.__dict__:
            return "another library has put its own forward on the layer"
        if self.kind == "linear" and cls.forward is nn.Linear.forward:
            return None
        if (
            self.kind == "conv1d"
            and cls.forward is sys.modules["transformers.pytorch_utils"].Conv1D.forward
        ):
            return None
        return f"{cls.__name__} has a forward of its own"

    @property
    def bias(self) -> Tensor | None:
        """[out] or None; an embedding has none."""
        bias: Tensor | None = getattr(self.module, "bias", None)
        return bias

    def project(
        self, x: Tensor, A: Tensor, dropout: float, training: bool, dtype: torch.dtype | None = None
    ) -> Tensor:
        """x Aᵀ [..., r] for A [r, in], in `dtype` (A's own if None); x [..., in], or ids [...]
        where the layer is an embedding.
        """
        if isinstance(self.module, nn.Embedding):
            return low_rank.down_index(
                x, A.to(dtype or A.dtype), dropout, training, self.module.padding_idx
            )
        return low_rank.down(x, A, dropout, training, dtype)


def view(module: nn.Module) -> HostView:
    """The view of a layer for which `host_kind` is not None."""
    kind = host_kind(module)
    if kind is None:
        raise TypeError(f"{type(module).__name__} is no layer that Weft adapts")
    return HostView(module, kind)
