"""How one layer computes its output, decided when something changes and read at every call.

A plan rests on the identity of the tensors, their dtypes, the class of the layer and whether it
trains. `holds` is the cheap test of all that; `compute` then only compares the size of the input.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..methods.base import LowRankMethod
from ..ops import fused, native, plan
from ..ops.low_rank import LowRank
from ..ops.row_scale import Ready, RowScale, Sources, cached_row_scale
from . import fallback


class LayerPlan:
    """`reason`: why the layer is computed by the general definition; None if `compute` may be
    called.
    """

    def __init__(self, layer: Any, x: Tensor) -> None:
        parameters = layer.base.module._parameters
        self.W, self.bias = parameters.get("weight"), parameters.get("bias")
        self.training, self.grad = layer.training, torch.is_grad_enabled()
        self.dtype, self._type = x.dtype, type(x)
        self._W_dtype = None if self.W is None else self.W.dtype
        self._W_trains = self.W is not None and self.W.requires_grad
        self._A: Tensor | None = None
        self._asked = fallback.asked
        own = layer._parameters
        self._sources = [(own, name, own.get(name)) for name in layer.names]
        self.reason: str | None = self._why_not(layer, x)
        if self.reason is None:
            self._decide(layer)
        self._sources.append((parameters, "weight", self.W))
        self._sources.append((parameters, "bias", self.bias))

    def holds(self, x: Tensor) -> bool:
        """Whether nothing has changed that this plan rests on."""
        for place, name, tensor in self._sources:
            if place.get(name) is not tensor:
                return False
        W = self.W
        if x.dtype is not self.dtype or type(x) is not self._type:
            return False
        if self._asked is not fallback.asked:
            return False
        if W is None:
            return self.reason is not None
        if W.dtype is not self._W_dtype or W.requires_grad is not self._W_trains:
            return False
        return self._A is None or self._A.dtype is self._A_dtype

    def compute(self, layer: Any, x: Tensor) -> Tensor:
        """Returns the layer's output [..., out] with its adapter, for x [..., in]."""
        f: LowRank = self._f if self._f is not None else layer.factors()
        W: Any = self.W.t() if self._transposed else self.W
        if self._tiny:
            return native.of_built(x, native.built(W, f), self.bias, f.m)
        small = x.numel() < self._native_below
        if self._native and (small or self._stays_native(x, W, f)):
            scale = None if f.m is None else self._scale(layer, f, W)
            if not self.grad:
                return native.forward_inference(x, W, self.bias, f, scale)
            h = None
            if self._shared_down is not None and x.numel() * len(f.A) >= plan.SHARED:
                h = self._shared_down(x, f.A, False)
            return native.forward_training(
                x, W, self.bias, f, None if scale is None else scale.norm, h
            )
        return self._fused(layer, x, W, f)

    def _why_not(self, layer: Any, x: Tensor) -> str | None:
        method = layer.method
        if not isinstance(method, LowRankMethod):
            return f"{type(method).__name__} is no product of two thin matrices"
        reason: str | None = layer.base.fallback_reason
        if reason is not None:
            return reason
        if fallback.asked:
            return f"{fallback.VARIABLE}=1 asks for it"
        if self.W is None:
            return "its weight is no parameter any more (pruned, parametrised or normalised)"
        reason = fallback.of_the_tensors(x, self.W, self.bias)
        if reason is None and self.grad and self.W.requires_grad:
            return "the layer's own weight trains too"
        return reason

    def _decide(self, layer: Any) -> None:
        assert self.W is not None
        f: LowRank = layer.factors()
        if f.norm_grad:
            self.reason = "the gradient flows through the norm"
        self._transposed = layer.base.transposed
        out, in_ = layer.shape
        self._dropout = layer.method.dropout if self.training else 0.0
        tensors = f.tensors()
        self._sources, fixed = self._places(layer, f)
        self._A, self._A_dtype = f.A, f.A.dtype
        self._native = not self._dropout and all(
            t.dtype is self.dtype for t in tensors if t is not f.d or fixed
        )
        wide = self.dtype in (torch.float32, torch.float64)
        few = wide and out * in_ <= plan.TINY
        diagonal = f.b is not None
        # W' keeps the input for its gradient. LoRA-FA, whose A is frozen, is chosen to keep only h.
        worth_it = f.A.requires_grad or diagonal if self.grad else not diagonal
        self._tiny = self._native and few and worth_it
        self._native_below = plan.native_below(out, in_, f.m is not None, diagonal)
        self._shared_down = None if layer.shared is None else layer.shared.down
        # A tensor that is computed from parameters (a view, a mask) is asked for in every call.
        self._f = f if fixed else None
        self._scale_name = "norm" if self.training else "norm in use"
        W = self.W.t() if self._transposed else self.W
        self._scale_sources = Sources.of(f, W, self.bias) if fixed and f.m is not None else None

    def _places(self, layer: Any, f: LowRank) -> tuple[list[tuple[Any, str, Any]], bool]:
        """Where the tensors come from, as (dictionary, name, tensor); and whether f can be kept."""
        owners = [layer._parameters, layer._buffers]
        if layer.shared is not None:
            owners.append(layer.shared._buffers)
        places = [(d, name, t) for d in owners for name, t in d.items()]
        frozen = {id(t) for d in owners[1:] for t in d.values()}
        own = {id(t) for _, _, t in places}
        fixed = all(id(t) in own or id(t._base) in frozen for t in f.tensors())
        used = {id(t) for t in f.tensors()} | {id(t._base) for t in f.tensors()}
        return [place for place in places if id(place[2]) in used or not fixed], fixed

    def _stays_native(self, x: Tensor, W: Tensor, f: LowRank) -> bool:
        """Whether larger work without gradients is still done with torch's own operations."""
        if self.grad or x.is_cuda or self._shared_down is not None:
            return False
        return not plan.builds(x, W, len(f.A), f.m is not None)

    def _scale(self, layer: Any, f: LowRank, W: Tensor) -> RowScale:
        sources = self._scale_sources
        found: Any = None if sources is None else layer.cache.fresh(self._scale_name, sources.all)
        if found is None:
            found, _ = cached_row_scale(
                f, W, self.bias, layer.cache, self.training, sources=sources
            )
        return found  # type: ignore[no-any-return]

    def _fused(self, layer: Any, x: Tensor, W: Tensor, f: LowRank) -> Tensor:
        scale, ready = None, Ready()
        build = not self._dropout and plan.builds(x, W, len(f.A), f.m is not None)
        if f.m is not None:
            scale, ready = cached_row_scale(f, W, self.bias, layer.cache, self.training, x, build)
        return fused.fused(
            x,
            W,
            self.bias,
            f,
            scale,
            ready,
            build=build,
            dropout=self._dropout,
            written=layer.written,
            shared_down=self._shared_down,
        )
