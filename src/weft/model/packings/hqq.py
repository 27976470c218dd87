"""HQQ: HQQLinear, which is no nn.Linear."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .base import Packing, own_name


class HQQ(Packing):
    """W in groups of 1 to 8 bits, each with a scale and a zero point."""

    package = "hqq"
    parameter = "W_q"
    holds = ("meta",)

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return own_name(module) == ("hqq", "HQQLinear")

    @classmethod
    def fault(cls, module: Any) -> str | None:
        return None if module.ready else "its weight is not packed yet; call its initialize() first"

    @classmethod
    def label(cls, module: Any) -> str:
        return f"HQQ, {module.meta['nbits']} bit"

    @classmethod
    def weight(cls, module: Any) -> Tensor:
        """Returns W [out, in]."""
        found: Tensor = module.dequantize()
        return found

    @classmethod
    def tensors(cls, module: Any) -> tuple[Tensor, ...]:
        """Returns the codes [...] and their scales [...]."""
        meta = module.meta
        return tuple(
            t for t in (module.W_q.data, meta["scale"], meta["zero"]) if isinstance(t, Tensor)
        )

    @classmethod
    def dtype(cls, module: Any) -> torch.dtype:
        found: torch.dtype = module.compute_dtype
        return found

    @classmethod
    def why_not_pack(cls, module: Any) -> str | None:
        if not getattr(module, "quant_config", None):
            return "HQQ has not kept how it was packed"
        return None

    @classmethod
    def pack(cls, module: Any, W: Tensor) -> None:
        """Packs W [out, in] into the layer."""
        del module.W_q  # a parameter, and quantize() sets a tensor of that name first
        module.quantize(W, **module.quant_config)
