"""Methods that act around the optimiser's step, without a call from the user.

torch calls two hooks around every `step` of every torch optimiser
(`register_optimizer_step_pre_hook`, `..._post_hook`). Ours act for attached adapters of such
methods (`Config.follows_steps`) if the optimiser has their tensors and a gradient has reached them.
So gradient accumulation, wrappers of optimisers (accelerate), closures and several adapters work
without further code, and a step that a GradScaler skips does not count. The counters are buffers of
the layers, so a copy of the model or its state_dict includes them. An optimiser that steps others
inside its own step (ZeroRedundancyOptimizer, SAM) takes one step.

An optimiser that has other tensors than the adapter's (flat shards, copies in float32) and writes
the results back is not seen here. That is an error: a `Watch` raises it in the third forward of the
training, and the audit reports it too.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from ..errors import UnsupportedError

_followed: weakref.WeakSet[Any] = weakref.WeakSet()
_begun: weakref.WeakKeyDictionary[Optimizer, list[Any]] = weakref.WeakKeyDictionary()
_partial: weakref.WeakKeyDictionary[Any, weakref.ref[Optimizer]] = weakref.WeakKeyDictionary()
_hooks: list[Any] = []


def follows(adapter: Any) -> bool:
    """Returns True if a layer of this adapter has a method that follows the optimiser's steps."""
    return any(layer.method.follows_steps for layer in adapter.layers.values())


def follow(adapter: Any) -> None:
    """Follows the steps of this adapter, if its method needs it, for as long as it is attached."""
    if follows(adapter):
        _followed.add(adapter)
        if not _hooks:
            _hooks.extend(
                (
                    register_optimizer_step_pre_hook(_before),
                    register_optimizer_step_post_hook(_after),
                )
            )


def unfollow(adapter: Any) -> None:
    """Stops following this adapter. If it was the last one, the hooks are removed from torch."""
    _followed.discard(adapter)
    if not len(_followed):
        for hook in _hooks:
            hook.remove()
        _hooks.clear()


def _before(optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
    _begun.pop(optimizer, None)  # left by a step that raised
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if closure is None:
        _begin(optimizer)
        return None

    def evaluated() -> Any:  # only now there are gradients
        loss = closure()
        _begin(optimizer)
        return loss

    if "closure" in kwargs:
        return args, {**kwargs, "closure": evaluated}
    return (args[0], evaluated, *args[2:]), kwargs


@torch.no_grad()
def _begin(optimizer: Optimizer) -> None:
    found_inf = getattr(
        optimizer, "found_inf", None
    )  # a fused optimiser is called anyway, and skips the step itself
    if isinstance(found_inf, Tensor) and bool(found_inf):
        return
    scale = getattr(optimizer, "grad_scale", None)
    again = optimizer in _begun  # a closure is evaluated more than once
    _begun[optimizer] = list(_adapters_to_move(optimizer))
    for adapter in _begun[optimizer]:
        adapter.config.before_step(adapter.layers, 1.0 if scale is None else float(scale), again)
        _forget(
            adapter
        )  # a closure may run the model again, with the tensors moved, within this step


@torch.no_grad()
def _after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for adapter in _begun.pop(optimizer, ()):
        adapter.config.after_step(adapter.layers)
        _forget(adapter)


def _forget(adapter: Any) -> None:
    for layer in adapter.layers.values():
        if layer.watch is not None:
            layer.watch.forget()


def _adapters_to_move(optimizer: Optimizer) -> Iterator[Any]:
    """Yields the attached adapters that this optimiser is about to move, except those that an outer
    optimiser is moving.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    busy = {
        id(adapter)
        for outer, adapters in list(_begun.items())
        if outer is not optimizer and _is_stepping(outer)
        for adapter in adapters
    }
    for adapter in list(_followed):
        if not adapter.is_attached:  # a copy of a handle, or detached
            _followed.discard(
                adapter
            )  # torch is going through the hooks, so they stay until a detach
            continue
        if id(adapter) in busy or not follows(adapter):
            continue
        own = [
            p
            for layer in adapter.layers.values()
            for p in layer.trainable().values()
            if p.requires_grad
        ]
        here = [p for p in own if id(p) in held]
        if any(p.grad is not None for p in here):
            if len(here) < len(own):
                _check_alone(adapter, optimizer)
            yield adapter


def _is_stepping(optimizer: Optimizer) -> bool:
    """Returns True if this optimiser's `step` is on the call stack; otherwise that step has raised."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_locals.get("self") is optimizer:
            return True
    return False


def _check_alone(adapter: Any, optimizer: Optimizer) -> None:
    """Raises UnsupportedError if another optimiser has the other tensors: a step would count twice."""
    first = _partial.get(adapter)
    other = first() if first is not None else None
    if other is not None and other is not optimizer:
        method = type(adapter.config).__name__
        raise UnsupportedError(
            f"the tensors of adapter {adapter.name!r} are in two optimisers, and {method} acts "
            "once a "
            "step on all of them. Give one optimiser adapter.parameters()."
        )
    _partial[adapter] = weakref.ref(optimizer)
