"""Which way a layer computes its output: a count of operations, chosen per call from four ways.

    tiny     the weight W' of a layer of few numbers, built in every call (native.py)
    native   the products of the definition, as torch records them: fewest calls (native.py)
    fused    one autograd function, which keeps and moves less (fused.py)
    built    the fused function through W' = σ ∘ (W + C A), C = s diag(b) B diag(d)

A layer of TINY numbers or less is built: that saves calls, forwards and backwards, which cost more
there than the numbers. An autograd function in Python costs CALLS_OF_FUSED numbers moved; below
that the native way is faster. Beside W the update costs tokens · r · out multiply-adds, and y is
read and written. Building costs out · in · r multiply-adds, W is read, and W' is written, read and
written again: it does not grow with the tokens. The same holds backwards, where "beside" needs g C
and then (g C) A. A row scale is one more pass over W' or over y. All counts are of one layer and
one direction. A number moved counts as the multiply-adds that take as long, PER_NUMBER: measured on
a two-core x86 CPU, in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

PER_NUMBER = 8.0
TINY = 1 << 13  # numbers of W, out · in
CALLS_OF_FUSED = 1 << 18  # numbers of input and output, tokens · (in + out)
SHARED = 1 << 22  # multiply-adds of x Aᵀ from which on it is shared between the layers that read x


def native_below(out: int, in_: int, scaled: bool, diagonal: bool) -> int:
    """Returns the numbers of x, tokens · in, below which a layer with gradients goes the native
    way.

    With a σ (`scaled`) the fused function also saves reading W twice. With d and b (`diagonal`) it
    folds them into B [out, r], which costs more than to scale the activations while tokens < in and
    out.
    """
    calls = CALLS_OF_FUSED // 2 if scaled else CALLS_OF_FUSED
    numbers = calls * in_ // (in_ + out)
    return max(numbers, in_ * min(in_, out)) if diagonal and CALLS_OF_FUSED else numbers


def builds(x: Tensor, W: Tensor, r: int, scaled: bool) -> bool:
    """Whether y of x [..., in] goes through a built W' [out, in]; `scaled`: there is a σ."""
    out, in_ = W.shape
    return may_build(x) and build_forward(x.numel() // max(in_, 1), out, in_, r, scaled)


def may_build(x: Tensor) -> bool:
    """In bfloat16 a built W' would round small updates away."""
    return x.dtype in (torch.float32, torch.float64)


def build_forward(tokens: int, out: int, in_: int, r: int, scaled: bool) -> bool:
    """Whether building W' is cheaper than the update beside W, for the output."""
    beside = tokens * out * (r + PER_NUMBER * (3 if scaled else 2))
    return _built(out, in_, r, scaled) < beside


def build_backward(
    tokens: int, out: int, in_: int, r: int, scaled: bool, small_gradient: bool
) -> bool:
    """The same for the input's gradient; `small_gradient`: A trains, so g C is needed either way."""
    beside = tokens * (
        in_ * (r + PER_NUMBER * 2)
        + (0 if small_gradient else out * r)
        + (out * PER_NUMBER * 2 if scaled else 0)
    )
    return _built(out, in_, r, scaled) < beside


def _built(out: int, in_: int, r: int, scaled: bool) -> float:
    return out * in_ * (r + PER_NUMBER * (6 if scaled else 4))
