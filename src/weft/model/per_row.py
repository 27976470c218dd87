"""Several adapters in one forward of a layer: one per row of the batch, or all with strengths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..ops import mixed
from ..ops.low_rank import row_scale
from .active import PerRow, Weighted


def by_row(rows: PerRow, layers: Mapping[str, Any], x: Tensor, y: Tensor) -> Tensor:
    """Returns the layer's output [..., out] from its input x [..., in] and own output y [..., out],
    each row with its own adapter. Raises WeftError if the first dimension is not the rows.
    """
    rows.check(x, feature_dims=x.dim() + 1 - y.dim())  # ids have no feature dimension
    if not y.shape[0]:
        return y
    here = [name for name in rows.groups if name in layers]
    together = [name for name in here if layers[name].joins(x)]
    out = y
    if together:
        parts = [_part(layers[name], tuple(rows.groups[name])) for name in together]
        bias = layers[together[0]].base.bias
        out = mixed.apply(x, y, bias, parts, len(rows.names)).view(y.shape)
        for name in together:
            layers[name].seen(out)
    for name in here:
        if name not in together:
            index = rows.index(name, y.shape[0], y.device)
            found = layers[name].seen(layers[name](x[index], y[index]))
            out = out.index_copy(0, index, found.to(out.dtype))
    return out


def weighted(active: Weighted, layers: Mapping[str, Any], x: Tensor, y: Tensor) -> Tensor:
    """Returns y + Σ w (adapter(x) - y) [..., out] from a layer's input x and own output y [..., out].

    An adapter that the layer does not have changes nothing there.
    """
    out = y
    for name, strength in active.strengths.items():
        if name in layers:
            layer = layers[name]
            out = torch.add(out, layer.seen(layer.change(x, y)).to(y.dtype), alpha=strength)
    return out


def _part(layer: Any, rows: tuple[int, ...]) -> mixed.Part:
    f = layer.factors()
    scale = layer.row_scale(f)
    sigma = None if scale is None else row_scale(f.m, scale.norm)
    return mixed.Part(f, rows, sigma, shared=layer.shared is not None)
