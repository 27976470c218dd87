"""Triton kernels for two steps in which a GPU would read and write an activation twice: imported
only if they can run.

    compose_up      y <- σ ∘ (y + s h Bᵀ - bias) + bias     y = W x + bias; for one adapter, or one per row
    compose_grad    σ ∘ g, and Σ_tokens g ∘ (y - bias)      in one pass over g and y

Every kernel has an equivalent in torch, in `fused.py` and `mixed.py`; tests compare the two on the
CPU under Triton's interpreter. `why_not` says which of the two runs, for `weft doctor`.
"""

from __future__ import annotations

import importlib.util
from os import environ
from typing import Any

import torch
from torch import Tensor

_OFF = "WEFT_TRITON"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def interpreted() -> bool:
    """Returns True if Triton interprets its kernels in Python, on CPU tensors: for tests."""
    return environ.get("TRITON_INTERPRET") == "1"


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Returns the reason why tensors of this device and dtype do not use the kernels, or None if
    they do.
    """
    if device.type != "cuda" and not interpreted():
        return f"the kernels are for GPUs, and this is {device.type!r}"
    if environ.get(_OFF) == "0":
        return f"{_OFF}=0 asks for it"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if dtype not in _DTYPES:
        return f"no kernel computes in {str(dtype).removeprefix('torch.')}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (7, 0):
        return "the GPU is older than what Triton compiles for"
    return None


def use(t: Tensor) -> bool:
    """Returns True if the kernels run for tensors of t's device and dtype."""
    return (t.is_cuda or interpreted()) and why_not(t.device, t.dtype) is None


def compose_up(
    y: Tensor,
    h: Tensor,
    B: Tensor,
    s: float,
    sigma: Tensor | None,
    bias: Tensor | None,
    index: Tensor | None = None,
) -> Tensor:
    """Writes σ ∘ (y + s h Bᵀ - bias) + bias to y [rows, tokens, out], and returns y.

    h is [rows, tokens, r]. B is [out, r] and σ [out]; or B is [k, out, r] and σ [k, out], and index
    [rows] has each row's adapter. Sums are in float32. Raises ValueError if y is not contiguous.
    """
    from . import triton_kernels

    if not y.is_contiguous():
        raise ValueError(
            f"compose_up writes to y [{', '.join(map(str, y.shape))}] by address, so it has to be "
            "contiguous"
        )
    return triton_kernels.compose_up(
        y, h.contiguous(), B.contiguous(), s, _contiguous(sigma), _contiguous(bias), index
    )


def compose_grad(g: Tensor, y: Tensor, sigma: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns σ ∘ g in g's dtype, and Σ_tokens g ∘ (y - bias) [out] in float32, for g and y
    [tokens, out].
    """
    from . import triton_kernels

    return triton_kernels.compose_grad(
        g.contiguous(), y.contiguous(), sigma.contiguous(), _contiguous(bias)
    )


def _contiguous(t: Any) -> Any:
    return None if t is None else t.detach().contiguous()
