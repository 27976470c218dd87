"""An adapted layer: the user's own module, its class swapped for a subclass that adds the active
adapters.

The layer stays where it is, stays an instance of its class and keeps its parameters; `restore`
gives the class back. One forward of an adapted layer:

    adapted_forward    which adapter is active for the caller (active.py); none: the layer's own forward
    AdapterLayer.run   the plan for (training, gradients), made when something changed (layer_plan.py)
    ops/native.py      small work, in torch's own operations      ops/fused.py  large work, in one function
    AdapterLayer.forward   the general definition, for everything that has no plan
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..methods import stacked
from ..methods.base import BranchMethod, LowRankMethod, Shared
from ..methods.config import DTYPES
from ..methods.rng import Rng
from ..ops.cache import Cache
from ..ops.input_cache import in_forward
from ..ops.low_rank import LowRank
from ..ops.norm import at_least_float32, full_precision, row_norm
from ..ops.row_scale import RowScale, cached_row_scale, packed_norm, stale
from . import fallback, part_calls
from .active import Active, ActiveAdapters, PerRow, Weighted
from .base_layers import input_of, own_forward
from .carried import ACTIVE, CHILD
from .casting import keep_distance, trained_of
from .conv_plan import plan_of
from .layer_plan import LayerPlan
from .per_row import by_row, weighted
from .steps_watch import Watch
from .swapped import Subclasses


class AdapterLayer(nn.Module):
    """One adapter's tensors on one layer; a method reads it as `p`. `shape` is the weight's (out,
    in).
    """

    ran = False  # whether it has ever been called, as far as Python sees it

    def __init__(self, method: Any, base: Any, shared: Shared | None) -> None:
        super().__init__()
        self.method, self.base, self.shared = method, base, shared
        self.shape = (base.out_features, base.in_features)
        self.full_shape = stacked.known(self.shape, base.stack)
        self.names = tuple(method.shapes(*self.shape))
        self.start_names = tuple(method.start_shapes(*self.shape))
        self.cache = Cache()
        self.active: ActiveAdapters = ActiveAdapters()  # the model's, after attach
        self.written = False  # whether something in the model may write to this layer's output
        self.watch: Watch | None = None  # of the first layer of an adapter that follows steps
        self._plans: list[LayerPlan | None] = [None] * 4  # per (training, gradients)

    def initialise(self, rng: Rng, filled: bool = False) -> None:
        """Creates the trained tensors at their initial values, and what the method keeps beside
        them: frozen tensors that are never saved, and buffers that are in the model's state_dict.

        `filled`: a file has all tensors, so a start that is taken from the weight is not computed.
        """
        self.rng, dtype = rng, DTYPES[self.method.dtype]
        with torch.no_grad():
            if filled and self.start_names:
                shapes = stacked.file_shapes(self.method, self.full_shape)
                values = {name: rng.full(shape) for name, shape in shapes.items()}
            else:
                values = stacked.initial(self.method, self.base, rng, self.shared)
            for name, value in values.items():
                if name in self.start_names:
                    # Wider than the trained tensor, so that its distance from here is not rounded.
                    wide = torch.promote_types(dtype, at_least_float32(self.base.weight()).dtype)
                    self.register_buffer(name, value.to(dtype).to(wide))
                else:
                    self.register_parameter(name, nn.Parameter(value.to(dtype)))
            frozen = self.frozen(rng.device)
            for name, value in frozen.items():
                self.register_buffer(name, value.to(dtype), persistent=False)
            buffers = self.method.buffers(*self.shape, rng.device)
            for name, value in buffers.items():
                self.register_buffer(name, value)
        self.frozen_names, self.buffer_names = tuple(frozen), tuple(buffers)

    def frozen(self, device: torch.device) -> dict[str, Tensor]:
        """Returns the method's frozen tensors for this layer, drawn again in float32."""
        rng, ids = Rng(self.rng.seed, self.rng.name, device), self.base.takes_ids
        return stacked.frozen(self.method, self.full_shape, ids, rng)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """A cast to bfloat16 and back would lose bits of the frozen tensors, so they are drawn
        again. What training began at moves by as much as the cast has moved the trained tensor.
        """
        before, trained = dict(self._buffers), trained_of(self)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        moved = next(
            (b for name, b in self._buffers.items() if b is not None and b is not before[name]),
            None,
        )
        for name, value in self.frozen(moved.device).items() if moved is not None else ():
            self._buffers[name] = value.to(self.get_buffer(name).dtype)
        for name, old in trained.items():
            keep_distance(self, name, old, before[name])
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_plans": [None] * 4}

    def trainable(self) -> dict[str, nn.Parameter]:
        """Returns the trained tensors by name, in the method's order."""
        return {name: self.get_parameter(name) for name in self.names}

    def stored(self) -> dict[str, Tensor]:
        """Returns the tensors [...] that a file has: the trained ones, and those that training
        began at.
        """
        return {**self.trainable(), **{name: self.get_buffer(name) for name in self.start_names}}

    @property
    def base_weight(self) -> Tensor | None:
        """The module's parameter [...] that stores W, as it is at the moment; None if it has none."""
        place: dict[str, Any] = self.base.module._parameters
        return place.get(getattr(self.base, "tensor", "weight"))

    @property
    def rank(self) -> int | None:
        """The rank in force, or None for a method without ranks."""
        found: int | None = self.method.rank(self)
        return found

    def become(self, method: Any) -> None:
        """Takes a configuration of smaller rank, whose tensors are the first part of these."""
        with torch.no_grad():
            for name, shape in method.shapes(*self.shape).items():
                old = self.get_parameter(name)
                first = old.detach()[tuple(slice(n) for n in shape)].clone()
                parameter = nn.Parameter(first, requires_grad=old.requires_grad)
                self.register_parameter(name, parameter)
            for name, value in method.buffers(*self.shape, self.base.device).items():
                value = value if name != "step" else self.get_buffer(name)
                self.register_buffer(name, value)
        self.method = method
        self._plans = [None] * 4

    def run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Returns the layer's output with this adapter."""
        x: Tensor = args[0] if args else input_of(kwargs)
        if len(args) + len(kwargs) == 1 and not torch.compiler.is_compiling():
            index = 2 * self.training + torch.is_grad_enabled()
            plan = self._plans[index]
            if plan is None or not plan.holds(x):
                self.ran = True  # before another thread finds the plan
                plan = self._plans[index] = plan_of(self, x)
            reason = plan.reason or fallback.of_the_moment(x)
            if reason is None:
                out = plan.compute(self, x)
                return out if self.watch is None else self.seen(out)
            fallback.note(reason)
        elif not torch.compiler.is_compiling() and not self.ran:
            self.ran = True
        return self.seen(self.forward(x, own_forward(module, *args, **kwargs)))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns the output [..., out] from the input x and the layer's own output y [..., out]:
        the general definition.
        """
        if isinstance(self.method, BranchMethod):
            return self.method.forward(x, y, self.base, self)
        f = self.factors()
        dropout = self.method.dropout if self.training else 0.0
        norm = None if f.m is None else self._norm(f)
        out: Tensor = self.base.adapted(x, y, f, norm, dropout)
        return out

    def change(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns the output with this adapter minus y [..., out], without taking that difference,
        for the input x and the layer's own output y; for methods of low rank.
        """
        f = self.factors()
        dropout = self.method.dropout if self.training else 0.0
        norm: Tensor | None = None
        if f.m is not None:
            direct = not torch.compiler.is_compiling() and self.fallback_reason(x) is None
            scale = self.row_scale(f) if direct else None
            norm = self._norm(f) if scale is None else scale.norm
        out: Tensor = self.base.change(x, y, f, norm, dropout)
        return out

    def factors(self) -> LowRank:
        """Returns the tensors as they are, for training or evaluation as the layer is in."""
        found: LowRank = self.method.factors(self, self.training)
        return found

    def _norm(self, f: LowRank) -> Tensor:
        """‖W + ΔW‖ [out], with its graph if the method asks for it."""
        codes = self.base.codes()
        if codes is not None and not f.norm_grad:
            with full_precision(self.base.device):
                return packed_norm(f, self.base.weight, codes, self.cache)
        W = self.base.weight()
        with (
            torch.set_grad_enabled(f.norm_grad and torch.is_grad_enabled()),
            full_precision(W.device),
        ):
            return row_norm(replace(f, m=None).weight(W))

    def row_scale(self, f: LowRank) -> RowScale | None:
        """Returns σ of the layer, kept until something changes if W is no copy; None without m."""
        if f.m is None:
            return None
        W, bias = self.base.weight(), self.base.bias
        if not self.base.is_view:  # its address says nothing of the weight
            return RowScale(f.m, self._norm(f), bias, W.dtype)
        return cached_row_scale(f, W, bias, self.cache, self.training)[0]

    def fallback_reason(self, x: Tensor) -> str | None:
        """Returns why this input takes the general definition; None if a direct way computes it."""
        index = 2 * self.training + torch.is_grad_enabled()
        if (plan := self._plans[index]) is None or not plan.holds(x):
            self.ran = True  # as in `run`, which finds this plan
            plan = self._plans[index] = plan_of(self, x)
        return plan.reason or fallback.of_the_moment(x)

    def joins(self, x: Tensor) -> bool:
        """Whether the layer can be computed together with others, each on rows of its own."""
        if torch.compiler.is_compiling() or self.base.is_convolution:
            return False
        if self.fallback_reason(x) is not None:
            return False
        return not (self.training and self.method.dropout)

    def is_stale(self) -> bool:
        """Whether a kept norm is no longer that of the weights; then it is dropped."""
        if not isinstance(self.method, LowRankMethod) or not len(self.cache):
            return False
        if self.base.codes() is not None:  # whose norm is kept by samples of these
            return False
        if self.base.device.type == "meta":  # offloaded between forwards
            return False
        f = self.method.factors(self, self.training)
        found = stale(f, self.base.weight(), self.base.bias, self.cache)
        if found:
            self.cache.clear()
        return found

    def forget(self) -> None:
        """Drops what is kept of the base's weight."""
        self._plans = [None] * 4
        self.cache.clear()

    def seen(self, out: Tensor) -> Tensor:
        """The output, after the watch over the optimiser's steps, if there is one, has looked at
        it.
        """
        if self.watch is not None and self.training and not torch.compiler.is_compiling():
            self.watch.look(self, out)
        return out


def adapted_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """The base layer's own forward, then the active adapters."""
    active: ActiveAdapters | None = self.__dict__.get(ACTIVE)
    if active is None:  # accelerate's hooks keep the forward that they found, even beyond detach
        return own_forward(self, *args, **kwargs)
    if in_forward():
        if active.merged is not None:  # the forward of the root has checked the caller's choice
            return own_forward(self, *args, **kwargs)
        name = active.current(self.training)
    else:
        name = part_calls.active_in(active, self.training)
    if name is None:
        return own_forward(self, *args, **kwargs)
    layers = self._modules[CHILD]._modules  # type: ignore[union-attr]
    if isinstance(name, PerRow) and not name.differ:
        name = name.names[0]
        if name is None:
            return own_forward(self, *args, **kwargs)
    if not isinstance(name, str):
        x, y = args[0] if args else input_of(kwargs), own_forward(self, *args, **kwargs)
        if isinstance(name, Weighted):
            return weighted(name, active, layers, x, y)
        return by_row(name, active, self, layers, x, y)
    layer: Any = layers.get(name)
    if layer is None:
        active.check_attached(name)
        return own_forward(self, *args, **kwargs)
    found: Tensor = layer.run(self, args, kwargs)
    return found


def chosen(self: nn.Module) -> tuple[ActiveAdapters | None, Active]:
    """Returns what adapts a module, and what is active in it for the caller; None is the base."""
    active: ActiveAdapters | None = self.__dict__.get(ACTIVE)
    if active is None:
        return None, None
    if in_forward():
        name = None if active.merged is not None else active.current(self.training)
    else:
        name = part_calls.active_in(active, self.training)
    if isinstance(name, PerRow) and not name.differ:
        name = name.names[0]
    return active, name


def _blank(base: type[nn.Module]) -> nn.Module:
    return _adapted.blank(base)


_adapted = Subclasses("Adapted", _blank, forward=adapted_forward)


def adapted_class(base: type[nn.Module]) -> type[nn.Module]:
    """Returns the subclass of a layer's own class that runs adapters, too."""
    return _adapted.of(base)
