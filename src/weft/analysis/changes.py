"""The change of a matrix in magnitude and in direction.

delta M = mean over rows | ‖W'_i‖ - ‖W_i‖ |              delta D = mean over rows (1 - cos(W'_i,
W_i))

W, W' [out, in] have one weight vector per row, that of one output. The paper writes the transpose
and says column; the axis is that of DoRA's trained magnitude (one number per output), as in the
authors' code. Source: arXiv:2402.09353, section 3.2. Both are means over single rows, so opposite
signs do not cancel in delta M.
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
from ..model.base_layers import carriers, is_linear, view
from ..ops.norm import full_precision


@dataclass(frozen=True)
class Change:
    """Delta M and delta D of a matrix. `undirected` is the number of rows that are 0 before or
    after: they have no direction and count in delta M only.
    """

    delta_m: float
    delta_d: float
    undirected: int = 0


@torch.no_grad()
def change(W: Tensor, changed: Tensor) -> Change:
    """Returns the change from W [out, in] to W' [out, in], in float64. Raises ValueError if the
    shapes differ.
    """
    if W.ndim != 2 or W.shape != changed.shape:
        raise ValueError(
            f"change: the matrices must have the same shape, not {list(W.shape)} and "
            f"{list(changed.shape)}."
        )
    before, after = W.double(), changed.double()
    m, m_after = (torch.linalg.vector_norm(t, dim=1) for t in (before, after))
    directed = (m > 0) & (m_after > 0)
    u, v = before[directed] / m[directed, None], after[directed] / m_after[directed, None]
    # 1 - cos of unit vectors is half of the squared distance, which is exact for nearly equal ones.
    turned = 0.5 * (v - u).square().sum(dim=1)
    d = float(turned.mean()) if turned.numel() else 0.0
    return Change(float((m_after - m).abs().mean()), d, int((~directed).sum()))


@torch.no_grad()
def changes_of(adapter: Adapter) -> Iterator[tuple[str, Change]]:
    """Yields module and change of every weight matrix that an attached adapter changes, in the
    model's order.

    If base tensors are trained as copies, only those of linear layers count; embeddings, the head
    and `modules_to_save` do not, as in "all-linear". Raises UnsupportedError if the method changes
    no weights, or no matrix.
    """
    config: Any = adapter.config
    if not config.mergeable:
        raise UnsupportedError(
            f"{type(config).__name__} does not change weights ({config.not_mergeable}), so it has "
            "neither magnitude nor direction."
        )
    order = {name: i for i, name in enumerate(carriers(dict(adapter.model.named_modules())))}
    found = {**_of_sites(adapter), **_of_selected(adapter)}
    if not found:
        raise UnsupportedError(
            f"{type(config).__name__} trains no weight matrix of a linear layer, so there is "
            "nothing to measure."
        )
    yield from sorted(found.items(), key=lambda item: order[item[0]])


def _of_sites(adapter: Adapter) -> dict[str, Change]:
    found = {}
    for module, site in adapter.layers.items():
        W = site.base.weight().detach().double()
        with full_precision(W.device):
            changed = effective_weight(site.method, W, site)
        # Every row is a weight vector by itself, so a stack of weights is one matrix.
        found[module] = change(W.flatten(0, -2), changed.flatten(0, -2))
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
