"""Adapters on fused experts: the forward of an adapted experts module, and the layer of one of its
weights.

The module's class is swapped for a subclass as that of any adapted layer. Its forward computes what
the module's own does (base_layers/experts.py), with the update of each weight beside its products:
for one adapter, for one per row of the batch, or for several with strengths.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import WeftError
from ..ops import grouped
from ..ops.grouped_norm import is_stale, row_norms
from ..ops.low_rank import row_scale
from ..ops.row_scale import output_tells
from .active import ActiveAdapters, PerRow, Weighted
from .base_layers import own_forward
from .base_layers.experts import Call, ExpertsLayer, implementation_fault, plain_linear
from .layer import AdapterLayer, chosen
from .row_calls import layout_of
from .row_probe import Recorder
from .swapped import Subclasses

Layers = Mapping[str, "StackedLayer"]  # by the name of the weight


class StackedLayer(AdapterLayer):
    """One adapter's tensors on one fused weight of experts, each with the dimension E in front."""

    base: ExpertsLayer

    def change(self, x: Tensor, y: Tensor, groups: Any = None) -> Tensor:
        """Returns y' - y - bias [rows, out] for rows x [rows, in] by expert and y = x W_eᵀ."""
        f = self.factors()
        return grouped.change(self._dropped(x), y, f, self.sigma(f), groups)

    def adapted(self, rows: grouped.Rows, groups: grouped.Groups) -> Tensor:
        """Returns the layer's output y' + bias [rows, out] for rows that are sorted by expert."""
        f, base, self.ran = self.factors(), self.base, True
        W, bias = base.weight(), base.bias
        if self.training and self.method.dropout:
            y, x = grouped.product(rows, W, groups), rows.all()
            y, sigma = y + grouped.update(self._dropped(x), f, groups), self.sigma(f)
            y = y if sigma is None else grouped.scaled(y, sigma, groups)
            return grouped.with_bias(y, bias, groups)
        if f.m is None:
            return grouped.layer(rows, W, bias, f, None, groups)
        norm = self._norms(f)
        keep = self.written or norm.requires_grad or not output_tells(f.m, norm, bias, W.dtype)
        return grouped.layer(rows, W, bias, f, row_scale(f.m, norm), groups, keep)

    def sigma(self, f: Any) -> Tensor | None:
        """σ [E, out] with the graph of m, or None without m."""
        return None if f.m is None else row_scale(f.m, self._norms(f))

    def _norms(self, f: Any) -> Tensor:
        return row_norms(f, self.base.weight(), self.base.parameter, self.cache)

    def is_stale(self) -> bool:
        """Whether a kept norm is no longer that of the weights; then it is dropped."""
        if not len(self.cache) or self.base.device.type == "meta":
            return False
        f, base = self.factors(), self.base
        found = is_stale(f, base.weight(), base.parameter, self.cache)
        if found:
            self.cache.clear()
        return found

    def _dropped(self, x: Tensor) -> Tensor:
        p = self.method.dropout if self.training else 0.0
        return nn.functional.dropout(x, p) if p else x


def adapted_experts(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """The forward of an experts module with adapters on its weights."""
    if torch.compiler.is_compiling():
        torch._dynamo.graph_break()
    active, which = chosen(self)
    if which is None or active is None:
        return own_forward(self, *args, **kwargs)
    reason = implementation_fault(self)
    if reason is not None:
        raise WeftError(f"the experts of {type(self).__name__} carry an adapter, and {reason}.")
    found = _layers(self)
    if isinstance(which, str):
        if not any(which in layers for layers in found.values()):
            active.check_attached(which)
            return own_forward(self, *args, **kwargs)
        mine = {tensor: layers[which] for tensor, layers in found.items() if which in layers}
        return Call(self, args, kwargs).compute(_of_one(self, mine))
    if isinstance(which, Weighted):
        for name in which.strengths:
            active.check_attached(name)
        return Call(self, args, kwargs).compute(_weighted(self, found, which))
    return _by_row(self, found, which, active, args, kwargs)


def _blank(base: type[nn.Module]) -> nn.Module:
    return _adapted.blank(base)


_adapted = Subclasses("Adapted", _blank, forward=adapted_experts)


def adapted_experts_class(base: type[nn.Module]) -> type[nn.Module]:
    """Returns the subclass of an experts class that runs adapters, too."""
    return _adapted.of(base)


def _layers(module: nn.Module) -> dict[str, Mapping[str, Any]]:
    """The adapters of each weight by name."""
    container: Any = module._modules["weft"]
    return {tensor: layers._modules for tensor, layers in container._modules.items()}


def _of_one(module: nn.Module, mine: Layers) -> Any:
    base = plain_linear(module)

    def linear(tensor: str, rows: grouped.Rows, groups: grouped.Groups) -> Tensor:
        layer = mine.get(tensor)
        return base(tensor, rows, groups) if layer is None else layer.adapted(rows, groups)

    return linear


def _weighted(module: nn.Module, found: Mapping[str, Mapping[str, Any]], which: Weighted) -> Any:
    def linear(tensor: str, rows: grouped.Rows, groups: grouped.Groups) -> Tensor:
        base, layers = ExpertsLayer(module, tensor), found.get(tensor, {})
        y = out = grouped.product(rows, base.weight(), groups)
        for name, strength in which.strengths.items():
            if name in layers:
                layers[name].ran = True
                out = torch.add(out, layers[name].change(rows.all(), y, groups), alpha=strength)
        return grouped.with_bias(out, base.bias, groups)

    return linear


def _by_row(
    module: nn.Module,
    found: Mapping[str, Mapping[str, Any]],
    rows: PerRow,
    active: ActiveAdapters,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Tensor:
    """The output, each row of the batch with its own adapter: a token takes it along to its
    experts.
    """
    call = Call(module, args, kwargs)
    here = {name for layers in found.values() for name in layers}
    if isinstance(rows, Recorder):
        rows.see(module, here, call.hidden, 1)
        return own_forward(module, *args, **kwargs)
    names = [name for name in rows.groups if name in here]
    if not names or not call.hidden.numel():
        return own_forward(module, *args, **kwargs)
    rows, layout = layout_of(rows, active, module, call.hidden, 1)
    positions, n = call.hidden.shape[:-1], len(rows.names)
    owner = torch.zeros(positions, dtype=torch.long)
    for row in range(1, n):
        owner[layout.owned(positions, n, row)] = row
    of_name = torch.tensor([names.index(a) if a in names else -1 for a in rows.names])
    which = of_name[owner.reshape(-1)].to(
        call.hidden.device
    )  # per position, the number of its name
    place: list[Tensor] = []

    base = plain_linear(module)

    def linear(tensor: str, x: grouped.Rows, groups: grouped.Groups) -> Tensor:
        layers, owners = found.get(tensor, {}), which[place[0]]
        parts = [(layers[n].adapted, owners == i) for i, n in enumerate(names) if n in layers]
        others = ~torch.stack([mine for _, mine in parts]).any(0) if parts else owners == owners
        out: list[tuple[Tensor, Tensor]] = []
        for compute, mask in (*parts, (lambda *own: base(tensor, *own), others)):
            mine = mask.nonzero()[:, 0]
            if len(mine):
                token = mine if x.token is None else x.token[mine]
                own = grouped.Groups(groups.ids[mine], groups.count)
                out.append((mine, compute(grouped.Rows(x.x, token), own)))
        found_rows = out[0][1].new_empty(groups.rows, out[0][1].shape[1])
        return found_rows.index_copy(
            0, torch.cat([m for m, _ in out]), torch.cat([y for _, y in out])
        )

    return call.compute(linear, place.append)
