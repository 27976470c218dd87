"""bitsandbytes: Linear4bit (NF4 and FP4) and Linear8bitLt."""

from __future__ import annotations

from copy import copy
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from .base import Packing, own_name

_NOT_YET = "its weight is not packed yet; move the model to its device first"


class FourBit(Packing):
    """W in blocks of 4-bit codes, each with a scale (`absmax`)."""

    package = "bitsandbytes"
    holds = ("quant_state",)

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return own_name(module) == ("bitsandbytes", "Linear4bit")

    @classmethod
    def fault(cls, module: Any) -> str | None:
        state = getattr(module.weight, "quant_state", None)
        if state is None:
            return _NOT_YET
        if getattr(state, "packing_format_for_cpu", False):
            return (
                "its first evaluation packed the weight anew for the CPU, after which bitsandbytes can "
                "neither unpack it nor give its input a gradient; load the model again and attach first"
            )
        return None

    @classmethod
    def prepare(cls, module: Any) -> None:
        # With AVX512-BF16 the first evaluation would pack the weight in a way that cannot be undone.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False

    @classmethod
    def label(cls, module: Any) -> str:
        state = getattr(module.weight, "quant_state", None)
        return "4 bit" if state is None else str(state.quant_type).upper()

    @classmethod
    def weight(cls, module: Any) -> Tensor:
        """Returns W [out, in]."""
        functional = import_module("bitsandbytes.functional")  # loaded: the layer is of its class
        found: Tensor = functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        return found

    @classmethod
    def tensors(cls, module: Any) -> tuple[Tensor, ...]:
        """Returns the codes [...] and their scales [...]."""
        state, nested = module.weight.quant_state, module.weight.quant_state.state2
        return module.weight.data, state.absmax, *(() if nested is None else (nested.absmax,))

    @classmethod
    def dtype(cls, module: Any) -> torch.dtype:
        found: torch.dtype = module.weight.quant_state.dtype
        return found

    @classmethod
    def why_not_pack(cls, module: Any) -> str | None:
        return None

    @classmethod
    def pack(cls, module: Any, W: Tensor) -> None:
        """Packs W [out, in] into the layer."""
        old = module.weight
        codes, state = import_module("bitsandbytes.functional").quantize_4bit(
            W.to(old.quant_state.dtype),
            blocksize=old.quant_state.blocksize,
            compress_statistics=old.quant_state.nested,
            quant_type=old.quant_state.quant_type,
            quant_storage=old.quant_storage,
        )
        module.weight = type(old)(
            codes,
            requires_grad=False,
            quant_state=state,
            blocksize=state.blocksize,
            compress_statistics=state.nested,
            quant_type=state.quant_type,
            quant_storage=old.quant_storage,
            bnb_quantized=True,
            module=module,
        )
        module.quant_state = state


class EightBit(Packing):
    """LLM.int8(): W in bytes, with a scale per row (`SCB`)."""

    package = "bitsandbytes"
    holds = ("state",)

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return own_name(module) == ("bitsandbytes", "Linear8bitLt")

    @classmethod
    def fault(cls, module: Any) -> str | None:
        if module.state.has_fp16_weights:
            return (
                "it keeps its weight in 16 bits (has_fp16_weights=True); use has_fp16_weights=False"
            )
        return None if module.weight.dtype == torch.int8 else _NOT_YET

    @classmethod
    def label(cls, module: nn.Module) -> str:
        return "int8"

    @classmethod
    def weight(cls, module: Any) -> Tensor:
        """Returns W [out, in]."""
        codes, scales = cls.tensors(module)
        return codes.float() * (scales.float() / 127)[:, None]

    @classmethod
    def tensors(cls, module: Any) -> tuple[Tensor, ...]:
        """Returns the codes [...] and their scales [...]."""
        state, weight = module.state, module.weight
        codes = state.CB if state.CB is not None else weight.data
        return codes, state.SCB if state.SCB is not None else weight.SCB

    @classmethod
    def dtype(cls, module: Any) -> torch.dtype:
        return torch.float32

    @classmethod
    def computes_in(cls, module: Any) -> torch.dtype:
        return torch.bfloat16  # in eval mode its inputs are rounded to 8 bits

    @classmethod
    def why_not_pack(cls, module: Any) -> str | None:
        return None

    @classmethod
    def pack(cls, module: Any, W: Tensor) -> None:
        """Packs W [out, in] into the layer."""
        functional = import_module("bitsandbytes.functional")
        codes, scales, _ = functional.int8_vectorwise_quant(W.to(torch.float16))
        new = type(module.weight)(codes, requires_grad=False, CB=codes, SCB=scales)
        module.weight = new
        module.state = copy(module.state)
        module.state.CB, module.state.SCB = codes, scales
