"""Rules that act around the optimiser's step, without a call from the user.

torch calls two hooks around every `step` of every torch optimiser
(`register_optimizer_step_pre_hook`, `..._post_hook`); ours look for adapters of such rules
(`methods.base.Stepped`) among those attached, and act where that optimiser holds their tensors and
a gradient has reached them. So gradient accumulation, wrappers of optimisers (accelerate), a
closure, and several adapters need nothing; a step that a GradScaler leaves out does not count; and
what an adapter has counted lies in its layers' buffers, so that a copy of the model or its
state_dict takes it along. An optimiser that steps others inside its own step
(ZeroRedundancyOptimizer, SAM) is one step.

An optimiser that holds other tensors than the adapter's (flat shards, copies in float32) and writes
into these is not seen here. That is an error: a `Watch` raises it in the third forward of the
training, and the audit has it too.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from ..errors import UnsupportedError
from ..methods.base import Stepped
from .state import find_state

if TYPE_CHECKING:
    from .adapter import Adapter
    from .layer import Site

_followed: weakref.WeakSet[Adapter] = weakref.WeakSet()
_begun: weakref.WeakKeyDictionary[Optimizer, list[Adapter]] = weakref.WeakKeyDictionary()
_partial: weakref.WeakKeyDictionary[Adapter, weakref.ref[Optimizer]] = weakref.WeakKeyDictionary()
_hooks: list[Any] = []


class Watch:
    """Sees tensors of one layer move twice, each time after a backward pass, while no optimiser
    step was followed.

    Moved by hand, from a file or by averaging they may be: then no gradient has reached them
    before. And once they may be after a gradient: SAM takes a second gradient somewhere else before
    it steps. A copy starts anew.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.forget()

    def forget(self) -> None:
        """What comes next is compared with the tensors of the forward to come."""
        self._known: list[Tensor] = []
        self._reached = False
        self._moves = 0

    def look(self, site: Site, out: Tensor) -> None:
        """Called in every forward in training, with the layer's output. Raises UnsupportedError."""
        if not out.requires_grad:
            return
        now = [
            getattr(site, name).detach() for name in site.names
        ]  # FSDP leaves no parameters in the layer
        if self._reached and not _alike(now, self._known):
            self._moves, self._reached = self._moves + 1, False
            if self._moves > 1:
                raise UnsupportedError(unseen(self.name, site.rule))
        if not self._reached:
            self._known = [t.clone() for t in now]
        out.register_hook(self._reach)  # type: ignore[no-untyped-call]

    def _reach(self, gradient: Tensor) -> None:
        self._reached = True

    def __reduce__(self) -> Any:
        return Watch, (self.name,)


def _alike(now: list[Tensor], known: list[Tensor]) -> bool:
    """Equal, or of another shape, dtype or device: then somebody has made them anew."""
    return all(
        torch.equal(a, b)
        for a, b in zip(now, known, strict=True)
        if (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
    )


def unseen(name: str, rule: Any) -> str:
    """What to say where an adapter's tensors have moved without a step of an optimiser that holds
    them.
    """
    method = type(rule).__name__
    return (
        f"the tensors of adapter {name!r} have moved, and no optimiser that holds them has taken a "
        f"step: {method} acts "
        "at every step, and has not. An optimiser with flat shards or copies of the tensors (FSDP, "
        "DeepSpeed, master "
        "weights) or a step by hand does that. Give adapter.parameters() to a torch.optim "
        "optimiser "
        "(ZeroRedundancyOptimizer may wrap it), or take a method that follows no steps, such as "
        "LoRA."
    )


def follows(adapter: Adapter) -> bool:
    """Something of this adapter depends on the optimiser's steps."""
    return isinstance(adapter.config, Stepped) and any(
        site.rule.follows_steps for site in adapter.sites.values() if isinstance(site.rule, Stepped)
    )


def follow(adapter: Adapter) -> None:
    """Act for this adapter from now on, if its rule asks for it and for as long as it is
    attached.
    """
    if isinstance(adapter.config, Stepped):
        _followed.add(adapter)
        if not _hooks:
            _hooks.extend(
                (
                    register_optimizer_step_pre_hook(_before),
                    register_optimizer_step_post_hook(_after),
                )
            )


def unfollow(adapter: Adapter) -> None:
    """No longer; without any adapter to follow, torch is left without our hooks."""
    _followed.discard(adapter)
    if not len(_followed):
        for hook in _hooks:
            hook.remove()
        _hooks.clear()


def _before(optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
    _begun.pop(optimizer, None)  # of a step that raised
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
    )  # a fused optimiser is called, and leaves the step out itself
    if isinstance(found_inf, Tensor) and bool(found_inf):
        return
    scale = getattr(optimizer, "grad_scale", None)
    again = optimizer in _begun  # a closure is evaluated more than once
    _begun[optimizer] = list(_held(optimizer))
    for adapter in _begun[optimizer]:
        adapter.config.before_step(adapter.sites, 1.0 if scale is None else float(scale), again)
        _forget(
            adapter
        )  # a closure may run the model again, with the tensors moved, within this step


@torch.no_grad()
def _after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for adapter in _begun.pop(optimizer, ()):
        adapter.config.after_step(adapter.sites)
        _forget(adapter)


def _forget(adapter: Adapter) -> None:
    for site in adapter.sites.values():
        if site.watch is not None:
            site.watch.forget()


def _held(optimizer: Optimizer) -> Iterator[Adapter]:
    """The attached adapters that this optimiser is about to move, but for those that one around it
    is moving.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    busy = {
        id(adapter)
        for outer, adapters in list(_begun.items())
        if outer is not optimizer and _is_stepping(outer)
        for adapter in adapters
    }
    for adapter in list(_followed):
        state = find_state(adapter.model)
        if (
            state is None or state.adapters.get(adapter.name) is not adapter
        ):  # a copy of a handle, or taken off
            _followed.discard(
                adapter
            )  # torch is going through the hooks, so they stay until a detach
            continue
        if id(adapter) in busy or not follows(adapter):
            continue
        own = [
            p
            for site in adapter.sites.values()
            for p in site.trainable().values()
            if p.requires_grad
        ]
        here = [p for p in own if id(p) in held]
        if any(p.grad is not None for p in here):
            if len(here) < len(own):
                _check_alone(adapter, optimizer)
            yield adapter


def _is_stepping(optimizer: Optimizer) -> bool:
    """Its `step` is on the call stack; else what it has begun is left of a step that raised."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_locals.get("self") is optimizer:
            return True
    return False


def _check_alone(adapter: Adapter, optimizer: Optimizer) -> None:
    """An optimiser with a part of the tensors is good only where no other one has the rest: a step
    would count twice.
    """
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
