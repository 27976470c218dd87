"""When it pays to build a layer's W' instead of carrying the update beside W: a count of operations
and of numbers moved.

    beside:  y = x Wᵀ, then y += h B̃ᵀ              tokens · r · out multiply-adds; y is read and written
    built:   W' = σ ∘ (W + B̃ A), then y = x W'ᵀ     out · in · r multiply-adds; W is read, W' written, read and written again

The first grows with the tokens and the second does not. The same holds backwards, where "beside"
needs g B̃ and then (g B̃) A. A row scale σ (DoRA) is one more pass over W' (read and written), or
over y while it is in the cache, or backwards over the gradient. All counts are of one layer and one
direction. A number moved counts as the multiply-adds that take as long, MULTIPLY_ADDS_A_NUMBER:
measured on a two-core x86 CPU, in float32.
"""

from __future__ import annotations

MULTIPLY_ADDS_A_NUMBER = 8.0


def build_forward(tokens: int, out: int, in_: int, r: int, scaled: bool) -> bool:
    """Building W' is cheaper than the update beside W, for the output."""
    beside = tokens * out * (r + MULTIPLY_ADDS_A_NUMBER * (3 if scaled else 2))
    return _built(out, in_, r, scaled) < beside


def build_backward(
    tokens: int, out: int, in_: int, r: int, scaled: bool, small_gradient: bool
) -> bool:
    """The same for the input's gradient; `small_gradient`: A trains, so that g B̃ is needed either
    way.
    """
    beside = tokens * (
        in_ * (r + MULTIPLY_ADDS_A_NUMBER * 2)
        + (0 if small_gradient else out * r)
        + (out * MULTIPLY_ADDS_A_NUMBER * 2 if scaled else 0)
    )
    return _built(out, in_, r, scaled) < beside


def _built(out: int, in_: int, r: int, scaled: bool) -> float:
    return out * in_ * (r + MULTIPLY_ADDS_A_NUMBER * (6 if scaled else 4))
