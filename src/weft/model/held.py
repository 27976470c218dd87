"""The forward of a module whose weight is adapted as a weight: W' stands in W's place while it
runs.

The module's class is swapped for a subclass in which the names of its weights are properties. They
give W' inside the module's own forward, and whenever a forward of the whole model reads them from
outside (the fused paths of nn.TransformerEncoderLayer); anywhere else they give the parameter, so
optimisers, files and merging see what they saw before. What is active is known per caller, so
threads with different adapters do not meet.
"""

from __future__ import annotations

import functools
import threading
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
from ..ops.input_cache import in_forward
from ..ops.low_rank import row_scale
from ..ops.norm import at_least_float32, full_precision, row_norm
from .active import Active, ActiveAdapters, PerRow, Weighted
from .base_layers import own_class, own_forward
from .carried import active_of, is_adapted, module_dict
from .layer import AdapterLayer, chosen
from .row_calls import layout_of
from .row_layout import Layout
from .row_probe import Recorder
from .swapped import Subclasses

_HOST = "_weft_host"  # on another module that holds a weight of the host: (the host, its key)
HELD = "_weft_held"  # on the subclasses of hosts
_FLAT = "_flat_weights"  # where recurrent layers keep their weights in order


class _Scopes(threading.local):
    """The hosts whose forwards this thread is inside of: (host, what is active, W' by key)."""

    def __init__(self) -> None:
        self.open: list[tuple[nn.Module, Active, dict[str, Tensor]]] = []


_scopes = _Scopes()
_kinds: dict[Any, Subclasses] = {}


def class_of(host: nn.Module) -> type[nn.Module]:
    """Returns the subclass of a host's class that lets W' stand in for its weights."""
    return _kind(True, isinstance(host, nn.RNNBase), _tensors(host)).of(type(host))


def hold(layer: AdapterLayer) -> None:
    """Called with every layer that has been put into the model: swaps the class of another module
    that holds a weight of the host.
    """
    host, holder = _pair(layer)
    if holder is not host and _HOST not in holder.__dict__:
        holder.__dict__[_HOST] = host, layer.base.slot
        holder.__class__ = _kind(False, False, (layer.base.tensor,)).of(type(holder))


def let_go(layer: AdapterLayer) -> None:
    """Undoes `hold`, if no other adapter is on that weight."""
    host, holder = _pair(layer)
    used = is_adapted(host) and layer.base.slot in module_dict(host) if host is not holder else True
    if not used and holder.__dict__.pop(_HOST, None) is not None:
        holder.__class__ = own_class(holder)


def _pair(layer: AdapterLayer) -> tuple[nn.Module, nn.Module]:
    return getattr(layer.base, "host", layer.base.module), layer.base.module


def _kind(host: bool, recurrent: bool, tensors: tuple[str, ...]) -> Subclasses:
    """The subclasses in which these weights are properties: of hosts, or of other modules that hold
    a weight of a host.
    """
    found = _kinds.get((host, recurrent, tensors))
    if found is None:
        members: dict[str, Any] = {tensor: _property(tensor) for tensor in tensors}
        if host:
            members |= {"forward": hosted_forward, HELD: True}
        if recurrent:
            members |= {_FLAT: property(_flat_weights, _set_flat_weights)}
            members |= {"_update_flat_weights": _update_flat_weights}
        blank = functools.partial(_blank, host, recurrent, tensors)
        found = _kinds[host, recurrent, tensors] = Subclasses("Adapted", blank, **members)
    return found


def _blank(
    host: bool, recurrent: bool, tensors: tuple[str, ...], base: type[nn.Module]
) -> nn.Module:
    return _kind(host, recurrent, tensors).blank(base)


def _tensors(host: nn.Module) -> tuple[str, ...]:
    """The parameters of a host that may be adapted as weights."""
    return tuple(n for n, p in host._parameters.items() if p is not None and p.ndim > 1)


def _property(tensor: str) -> property:
    def get(self: nn.Module) -> Any:
        place = self.__dict__.get(_HOST)
        host, key = (self, tensor) if place is None else place
        own: Any = self._parameters.get(tensor)
        if own is None:
            own = self.__dict__.get(tensor)  # pruned, or FSDP's
        return own if own is None else standing_in(host, key, own)

    def put_there(self: nn.Module, value: Any) -> None:
        self.__dict__[tensor] = value

    def delete(self: nn.Module) -> None:
        self.__dict__.pop(tensor, None)

    return property(get, put_there, delete)


def standing_in(host: nn.Module, key: str, own: Tensor) -> Tensor:
    """What a read of a weight gives: W' where an adapter is at work, else the weight itself."""
    active = active_of(host)
    if active is None:
        return own
    for running, choice, found in reversed(_scopes.open):
        if running is host:
            if key not in found:
                found[key] = _built(host, key, own, choice)
            return found[key]
    if torch.compiler.is_compiling() or not in_forward() or active.merged is not None:
        return own
    choice = active.current(host.training)  # its parent reads it, in a forward of the model
    if isinstance(choice, PerRow):
        if not choice.differ:
            choice = choice.names[0]
        elif isinstance(choice, Recorder):
            return own
        else:
            raise _unknown_rows(host, "another module reads its weight")
    return _built(host, key, own, choice)


def _built(host: nn.Module, key: str, own: Tensor, choice: Any) -> Tensor:
    """W' as it is stored [out, ...], in the dtype of the weight: rounded as merging rounds it."""
    if choice is None:
        return own
    if isinstance(choice, Weighted):
        W, total = at_least_float32(own.flatten(1)), None
        for name, strength in choice.strengths.items():
            layer = _layer(host, name, key)
            if layer is not None:
                part = strength * (built(layer, W) - W)
                total = part if total is None else total + part
        return own if total is None else (W + total).to(own.dtype).view_as(own)
    layer = _layer(host, choice, key)
    return own if layer is None else built(layer, own.flatten(1)).to(own.dtype).view_as(own)


def _layer(host: nn.Module, name: str, key: str) -> AdapterLayer | None:
    found: Any = module_dict(host)._modules.get(key)
    layer: AdapterLayer | None = None if found is None else found._modules.get(name)
    if layer is None:
        active: Any = active_of(host)
        active.check_attached(name)
    return layer


def built(layer: AdapterLayer, W: Tensor) -> Tensor:
    """Returns W' [out, in] with its graph in float32 or wider, for W [out, in]. The norm of DoRA is
    a constant for the gradient unless the method asks for more.
    """
    if not torch.compiler.is_compiling() and not layer.ran:
        layer.ran = True
    f = layer.factors()
    with full_precision(W.device):
        wide = at_least_float32(W)
        V = wide + f.delta(wide.dtype)
        if f.m is not None:
            norm = row_norm(V if f.norm_grad else V.detach())
            V = row_scale(f.m, norm)[:, None] * V
    return layer.seen(V)


def hosted_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The module's own forward, in which the weights of the active adapters stand in."""
    active, choice = chosen(self)
    if active is None:
        return own_forward(self, *args, **kwargs)
    if choice is None:
        return own_forward(self, *args, **kwargs)
    if isinstance(choice, PerRow):
        return _by_row(choice, active, self, args, kwargs)
    return inside(self, choice, args, kwargs)


def inside(host: nn.Module, choice: Active, args: Any, kwargs: Any) -> Any:
    _scopes.open.append((host, choice, {}))
    try:
        return own_forward(host, *args, **kwargs)
    finally:
        _scopes.open.pop()


# Several adapters in one batch: the host runs once per adapter, and each run gives its own rows.


def _by_row(rows: PerRow, active: ActiveAdapters, host: nn.Module, args: Any, kwargs: Any) -> Any:
    layers = {name for each in module_dict(host).children() for name in each._modules}
    x, dims = _batch(host, args, kwargs)
    if isinstance(rows, Recorder):
        if dims is not None:
            rows.see(host, layers, x, 1)
        return inside(host, None, args, kwargs)
    here = [name for name in rows.groups if name in layers]
    if not here:
        return inside(host, None, args, kwargs)
    if dims is None:
        raise _unknown_rows(
            host, "it is not known where the rows of the batch are in what it reads"
        )
    rows, layout = layout_of(rows, active, host, x, 1)
    if layout.dim != dims[0] and not isinstance(host, nn.Bilinear):
        raise _unknown_rows(host, "it reads the rows of the batch as positions of one sequence")
    out: Any = None
    if len(here) < len(rows.groups) or None in rows.names:
        out = inside(host, None, args, kwargs)
    for name in here:
        found = inside(host, name, args, kwargs)
        out = (
            found if out is None else _with_rows(out, found, rows.groups[name], layout, rows, dims)
        )
    return out


def _batch(host: nn.Module, args: Any, kwargs: Any) -> tuple[Any, tuple[int, ...] | None]:
    """The input [*positions, in] whose positions are the rows, and the dimension of the rows in
    each tensor of the output; None if that is not known.
    """
    names = {nn.MultiheadAttention: "query", nn.Bilinear: "input1"}
    name = next((n for cls, n in names.items() if isinstance(host, cls)), "input")
    x = args[0] if args else kwargs.get(name)
    if not isinstance(x, Tensor):
        return x, None  # a PackedSequence has its rows in the order of their lengths
    at = 0 if getattr(host, "batch_first", True) else 1
    if isinstance(host, nn.MultiheadAttention) and x.dim() == 3:
        return x, (at, 0)
    if isinstance(host, nn.RNNBase) and x.dim() == 3:
        return x, (at, 1, 1)
    if isinstance(host, nn.modules.rnn.RNNCellBase) and x.dim() == 2:
        return x, (0, 0)
    return x, ((0,) if isinstance(host, nn.Bilinear) and x.dim() > 1 else None)


def _with_rows(
    out: Any, found: Any, mine: list[int], layout: Layout, rows: PerRow, dims: tuple[int, ...]
) -> Any:
    """`out` with the rows of `found` that belong to one adapter."""
    tensors, others = list(_leaves(out)), list(_leaves(found))
    taken = []
    for i, (a, b) in enumerate(zip(tensors, others, strict=True)):
        dim = layout.dim if len(dims) == 1 else dims[min(i, len(dims) - 1)]
        at = torch.arange(a.shape[dim], device=a.device)
        n = len(rows.names)
        owner = at % n if layout.kind == "cycles" else at // max(1, len(at) // n)
        index = at[torch.isin(owner, torch.tensor(mine, device=a.device))]
        taken.append(a.index_copy(dim, index, b.index_select(dim, index)))
    return _rebuilt(out, iter(taken))


def _leaves(value: Any) -> Any:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for each in value:
            yield from _leaves(each)


def _rebuilt(value: Any, leaves: Any) -> Any:
    if isinstance(value, Tensor):
        return next(leaves)
    return tuple(_rebuilt(v, leaves) for v in value) if isinstance(value, tuple) else value


def _unknown_rows(host: nn.Module, reason: str) -> UnsupportedError:
    return UnsupportedError(
        f"weft.use was given one adapter per row, and {own_class(host).__name__} reads an adapted weight "
        f"itself: {reason}. Run each adapter's rows in a batch of their own."
    )


def _flat_weights(self: Any) -> Any:
    if _scope_of(self) is None:
        return self.__dict__[_FLAT]
    return [getattr(self, n, None) for n in self._flat_weights_names]


def _set_flat_weights(self: Any, value: Any) -> None:
    self.__dict__[_FLAT] = value


def _update_flat_weights(self: Any) -> None:
    # torch compares the weights with those of the last forward, and would keep W' for the next.
    if _scope_of(self) is None:
        own_class(self)._update_flat_weights(self)  # type: ignore[attr-defined]


def _scope_of(host: nn.Module) -> Any:
    return next((choice for running, choice, _ in reversed(_scopes.open) if running is host), None)
