"""Rules that act around the optimiser's step, without a call from the user.

torch calls two hooks around every `step` of every torch optimiser (`register_optimizer_step_pre_hook`, `..._post_hook`);
ours look for adapters of such rules (`methods.base.Stepped`) among those attached, and act where that optimiser holds
their tensors and a gradient has reached them. So gradient accumulation, wrappers of optimisers (accelerate), a closure,
and several adapters need nothing; a step that a GradScaler leaves out does not count; and what an adapter has counted
lies in its layers' buffers, so that a copy of the model or its state_dict takes it along.
"""

from __future__ import annotations

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

_followed: weakref.WeakSet[Adapter] = weakref.WeakSet()
_begun: weakref.WeakKeyDictionary[Optimizer, list[Adapter]] = weakref.WeakKeyDictionary()
_partial: weakref.WeakKeyDictionary[Adapter, weakref.ref[Optimizer]] = weakref.WeakKeyDictionary()
_hooks: list[Any] = []


def follow(adapter: Adapter) -> None:
    """Act for this adapter from now on, if its rule asks for it and for as long as it is attached."""
    if isinstance(adapter.config, Stepped):
        _followed.add(adapter)
        if not _hooks:
            _hooks.extend((register_optimizer_step_pre_hook(_before), register_optimizer_step_post_hook(_after)))


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
    found_inf = getattr(optimizer, "found_inf", None)  # a fused optimiser is called, and leaves the step out itself
    if isinstance(found_inf, Tensor) and bool(found_inf):
        return
    scale = getattr(optimizer, "grad_scale", None)
    _begun[optimizer] = list(_held(optimizer))
    for adapter in _begun[optimizer]:
        adapter.config.before_step(adapter.sites, 1.0 if scale is None else float(scale))


@torch.no_grad()
def _after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for adapter in _begun.pop(optimizer, ()):
        adapter.config.after_step(adapter.sites)


def _held(optimizer: Optimizer) -> Iterator[Adapter]:
    """The attached adapters that this optimiser is about to move."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for adapter in list(_followed):
        state = find_state(adapter.model)
        if state is None or state.adapters.get(adapter.name) is not adapter:  # a copy of a handle, or taken off
            unfollow(adapter)
            continue
        own = [p for site in adapter.sites.values() for p in site.trainable().values() if p.requires_grad]
        here = [p for p in own if id(p) in held]
        if any(p.grad is not None for p in here):
            if len(here) < len(own):
                _check_alone(adapter, optimizer)
            yield adapter


def _check_alone(adapter: Adapter, optimizer: Optimizer) -> None:
    """An optimiser with a part of the tensors is good only where no other one has the rest: a step would count twice."""
    first = _partial.get(adapter)
    other = first() if first is not None else None
    if other is not None and other is not optimizer:
        method = type(adapter.config).__name__
        raise UnsupportedError(f"the tensors of adapter {adapter.name!r} are in two optimisers, and {method} acts once a "
                               "step on all of them. Give one optimiser adapter.parameters().")
    _partial[adapter] = weakref.ref(optimizer)
