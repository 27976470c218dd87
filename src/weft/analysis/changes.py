"""How far a matrix has moved in magnitude and in direction.

    delta M = mean over rows | ‖W'_i‖ - ‖W_i‖ |              delta D = mean over rows (1 - cos(W'_i, W_i))

W, W' [out, in]: one weight vector a row, that of one output. The paper writes the transpose and
says column; the axis is that of DoRA's trained magnitude (one number an output) in the authors'
code and here. Source: arXiv:2402.09353, section 3.2. Both are means of what single rows do, so
opposite signs do not cancel in delta M.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..methods.base import effective_weight
from ..model.adapter import Adapter
from ..model.base_layers import is_linear, view
from ..ops.norm import full_precision


@dataclass(frozen=True)
class Change:
    """delta M and delta D of a matrix. `undirected`: rows that are 0 before or after, which have no
    direction and count in delta M alone.
    """

    delta_m: float
    delta_d: float
    undirected: int = 0


@torch.no_grad()
def change(W: Tensor, changed: Tensor) -> Change:
    """Of W [out, in] and W' [out, in], in float64. Raises ValueError for other shapes."""
    if W.ndim != 2 or W.shape != changed.shape:
        raise ValueError(
            f"change: two matrices of one shape are compared, not {list(W.shape)} and "
            f"{list(changed.shape)}."
        )
    before, after = W.double(), changed.double()
    m, m_after = (torch.linalg.vector_norm(t, dim=1) for t in (before, after))
    directed = (m > 0) & (m_after > 0)
    u, v = before[directed] / m[directed, None], after[directed] / m_after[directed, None]
    # 1 - cos of unit vectors is half of the squared distance, which loses no digits where the two
    # are nearly the same.
    turned = 0.5 * (v - u).square().sum(dim=1)
    d = float(turned.mean()) if turned.numel() else 0.0
    return Change(float((m_after - m).abs().mean()), d, int((~directed).sum()))


@torch.no_grad()
def changes_of(adapter: Adapter) -> Iterator[tuple[str, Change]]:
    """Module and change of every weight matrix that an attached adapter changes, in the model's
    order.

    Of base tensors trained as copies: those of linear maps; embeddings, the head and
    `modules_to_save` are left out, as "all-linear" leaves them out. Raises UnsupportedError where
    the method is no change of weights, or of no matrix.
    """
    config: Any = adapter.config
    if not config.mergeable:
        raise UnsupportedError(
            f"{type(config).__name__} is no change of weights ({config.not_mergeable}), so it has "
            "neither magnitude nor direction."
        )
    order = {name: place for place, (name, _) in enumerate(adapter.model.named_modules())}
    found = {**_of_sites(adapter), **_of_selected(adapter)}
    if not found:
        raise UnsupportedError(
            f"{type(config).__name__} trains no weight matrix of a linear layer here, so there is "
            "nothing to measure."
        )
    yield from sorted(found.items(), key=lambda item: order[item[0]])


def _of_sites(adapter: Adapter) -> dict[str, Change]:
    found = {}
    for module, site in adapter.layers.items():
        W = site.base.weight().detach().double()
        with full_precision(W.device):
            found[module] = change(W, effective_weight(site.method, W, site))
    return found


def _of_selected(adapter: Adapter) -> dict[str, Change]:
    found = {}
    for name, tensor in adapter.selected_tensors.items():
        module, _, kind = name.rpartition(".")
        layer = adapter.model.get_submodule(module)
        if kind == "weight" and not tensor.head and is_linear(layer):
            W, changed = tensor.original.detach(), tensor.trained.detach()
            if view(layer).transposed:
                W, changed = W.t(), changed.t()
            found[module] = change(W, changed)
    return found
