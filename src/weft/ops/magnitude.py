"""DoRA's row norm and its compose step, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

# Below this a row has no direction; the norm is held here so that an all-zero row stays zero and never turns NaN.
SMALLEST = torch.finfo(torch.float32).tiny


def row_norm(V: Tensor) -> Tensor:
    """Euclidean norm of each row of V [out, in] in float32 or wider -> [out], never below the smallest normal."""
    wide = V if V.dtype == torch.float64 else V.float()
    norm: Tensor = torch.linalg.vector_norm(wide, dim=1)
    return norm.clamp_min(SMALLEST)


def compose(y: Tensor, bias: Tensor | None, update: Tensor, scale: Tensor) -> Tensor:
    """scale · (W x + update) + bias, from y = W x + bias [..., out], update [..., out], scale [out].

    Written as y + (scale - 1)(y - bias) + scale · update: with scale exactly 1 and update 0 it returns y bit for
    bit, and the bias stays outside the scale. The difference scale - 1 is taken in the scale's own (wide) dtype.
    """
    straight = y if bias is None else y - bias.to(y.dtype)
    return y + (scale - 1).to(y.dtype) * straight + scale.to(y.dtype) * update
