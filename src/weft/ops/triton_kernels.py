"""The kernels of `kernels.py` in Triton. Importing this imports Triton."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _compose_up(
    y,
    h,
    B,
    sigma,
    bias,
    index,
    tokens,
    out,
    r,
    s,
    HAS_SIGMA: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    WIDE: tl.constexpr,
    T: tl.constexpr,
    OUT: tl.constexpr,
    R: tl.constexpr,
):
    """One tile of T tokens of one row and OUT outputs; the rank is walked in steps of R."""
    row = tl.program_id(0).to(tl.int64)
    t = tl.program_id(1) * T + tl.arange(0, T)
    o = tl.program_id(2) * OUT + tl.arange(0, OUT)
    adapter = tl.load(index + row).to(tl.int64) if HAS_INDEX else row * 0
    in_t, in_o = t < tokens, o < out
    total = tl.zeros((T, OUT), dtype=tl.float32)
    for k in range(0, r, R):
        i = k + tl.arange(0, R)
        in_i = i < r
        low = tl.load(
            h + (row * tokens + t[:, None]) * r + i[None, :],
            mask=in_t[:, None] & in_i[None, :],
            other=0.0,
        )
        up = tl.load(
            B + (adapter * out + o[None, :]) * r + i[:, None],
            mask=in_o[None, :] & in_i[:, None],
            other=0.0,
        )
        if WIDE:
            low, up = low.to(tl.float32), up.to(tl.float32)
        total += tl.dot(low, up, input_precision="ieee")
    place = (row * tokens + t[:, None]) * out + o[None, :]
    inside = in_t[:, None] & in_o[None, :]
    value = tl.load(y + place, mask=inside, other=0.0).to(tl.float32) + s * total
    if HAS_SIGMA:
        more = tl.load(sigma + adapter * out + o, mask=in_o, other=1.0).to(tl.float32) - 1.0
        straight = value
        if HAS_BIAS:
            straight = value - tl.load(bias + o, mask=in_o, other=0.0).to(tl.float32)[None, :]
        value += more[None, :] * straight
    tl.store(y + place, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _compose_grad(
    g,
    y,
    sigma,
    bias,
    scaled,
    sums,
    tokens,
    out,
    HAS_BIAS: tl.constexpr,
    T: tl.constexpr,
    OUT: tl.constexpr,
):
    """One tile: σ ∘ g, and its column sums of g ∘ (y - bias) into row program_id(0) of `sums`."""
    t = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T)
    o = tl.program_id(1) * OUT + tl.arange(0, OUT)
    in_o = o < out
    inside = (t < tokens)[:, None] & in_o[None, :]
    place = t[:, None] * out + o[None, :]
    up = tl.load(g + place, mask=inside, other=0.0).to(tl.float32)
    z = tl.load(y + place, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        z -= tl.load(bias + o, mask=in_o, other=0.0).to(tl.float32)[None, :]
    more = tl.load(sigma + o, mask=in_o, other=1.0).to(tl.float32)
    tl.store(scaled + place, (more[None, :] * up).to(scaled.dtype.element_ty), mask=inside)
    tl.store(sums + tl.program_id(0) * out + o, tl.sum(up * z, axis=0), mask=in_o)


def compose_up(
    y: Tensor,
    h: Tensor,
    B: Tensor,
    s: float,
    sigma: Tensor | None,
    bias: Tensor | None,
    index: Tensor | None,
) -> Tensor:
    """Writes σ ∘ (y + s h Bᵀ - bias) + bias to y [rows, tokens, out]; see `kernels.compose_up`."""
    rows, tokens, out = y.shape
    r = h.shape[-1]
    T, OUT, R = _tile(tokens, 64), 64, _tile(r, 64)
    grid = (rows, triton.cdiv(tokens, T), triton.cdiv(out, OUT))
    if y.numel():
        _launch(
            _compose_up,
            grid,
            y,
            y,
            h,
            B,
            _or(sigma, y),
            _or(bias, y),
            _or(index, y),
            tokens,
            out,
            r,
            float(s),
            sigma is not None,
            bias is not None,
            index is not None,
            not y.is_cuda,  # Triton's interpreter knows no product of bfloat16
            T,
            OUT,
            R,
        )
    return y


def compose_grad(g: Tensor, y: Tensor, sigma: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns σ ∘ g [tokens, out] and a sum [out]; see `kernels.compose_grad`."""
    tokens, out = g.shape
    T, OUT = 64, 64
    scaled, blocks = torch.empty_like(g), triton.cdiv(tokens, T)
    sums = torch.zeros(max(blocks, 1), out, dtype=torch.float32, device=g.device)
    if g.numel():
        _launch(
            _compose_grad,
            (blocks, triton.cdiv(out, OUT)),
            g,
            g,
            y,
            sigma,
            _or(bias, y),
            scaled,
            sums,
            tokens,
            out,
            bias is not None,
            T,
            OUT,
        )
    return scaled, sums.sum(0)


def _tile(n: int, most: int) -> int:
    """A power of two that a tensor core's product takes, no more than n needs."""
    return int(min(most, max(16, triton.next_power_of_2(n))))


def _or(t: Tensor | None, other: Tensor) -> Tensor:
    return other if t is None else t


def _launch(kernel: Any, grid: tuple[int, ...], on: Tensor, *args: Any) -> None:
    if on.is_cuda:
        with torch.cuda.device(on.device):
            kernel[grid](*args)
    else:
        kernel[grid](*args)
