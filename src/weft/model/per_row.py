"""Several adapters in one forward of a layer: one per row of the batch, or all with strengths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import mixed
from ..ops.low_rank import row_scale
from .active import ActiveAdapters, PerRow, Weighted
from .row_calls import layout_of
from .row_probe import Recorder


def by_row(
    rows: PerRow,
    active: ActiveAdapters,
    module: nn.Module,
    layers: Mapping[str, Any],
    x: Tensor,
    y: Tensor,
) -> Tensor:
    """Returns the output [..., out] of an adapted module from its input x [..., in] and own output
    y [..., out], each row with its own adapter.

    Raises WeftError if it is not known where in x the rows are.
    """
    feature_dims = next(iter(layers.values())).base.feature_dims(x, y)
    if isinstance(rows, Recorder):
        rows.see(module, layers, x, feature_dims)
        return y
    here = [name for name in rows.groups if name in layers]
    if not here or not y.numel():
        return y
    rows, layout = layout_of(rows, active, module, x, feature_dims)
    if layout.is_first:
        return _by_first(rows, here, layers, x, y)
    n = len(rows.names)
    first = layout.rows_first(x, n), layout.rows_first(y, n)
    if first[0].dim() == x.dim() or feature_dims < 2:
        return layout.restored(_by_first(rows, here, layers, *first), y.shape)
    # Each row has several images, and a convolution takes one dimension of images.
    found = _by_first(rows, here, layers, *(t.flatten(0, 1) for t in first))
    return layout.restored(found.reshape(n, -1, *found.shape[1:]), y.shape)


def _by_first(
    rows: PerRow, here: list[str], layers: Mapping[str, Any], x: Tensor, y: Tensor
) -> Tensor:
    """`by_row` of an input whose first dimension is the rows, or the tokens of one after another."""
    together = [name for name in here if layers[name].joins(x)]
    out = y
    if together:
        parts = [_part(layers[name], tuple(rows.groups[name])) for name in together]
        bias = layers[together[0]].base.bias
        out = mixed.apply(x, y, bias, parts, len(rows.names)).view(y.shape)
        for name in together:
            _called(layers[name])
            layers[name].seen(out)
    for name in here:
        if name not in together:
            _called(layers[name])
            index = rows.index(name, y.shape[0], y.device)
            found = layers[name].seen(layers[name](x[index], y[index]))
            out = out.index_copy(0, index, found.to(out.dtype))
    return out


def weighted(
    active: Weighted, adapters: ActiveAdapters, layers: Mapping[str, Any], x: Tensor, y: Tensor
) -> Tensor:
    """Returns y + Σ w (adapter(x) - y) [..., out] from a layer's input x and own output y [...,
    out].

    An adapter that the layer does not have changes nothing there. Raises WeftError if it was
    detached.
    """
    out = y
    for name, strength in active.strengths.items():
        if name in layers:
            layer = layers[name]
            _called(layer)
            out = torch.add(out, layer.seen(layer.change(x, y)).to(y.dtype), alpha=strength)
        else:
            adapters.check_attached(name)
    return out


def _called(layer: Any) -> None:
    if not layer.ran:  # to write an attribute of a module costs a microsecond
        layer.ran = True


def _part(layer: Any, rows: tuple[int, ...]) -> mixed.Part:
    f = layer.factors()
    scale = layer.row_scale(f)
    sigma = None if scale is None else row_scale(f.m, scale.norm)
    return mixed.Part(f, rows, sigma, shared=layer.shared is not None)
