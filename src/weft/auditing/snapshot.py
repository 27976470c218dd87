"""A snapshot: copies of the declared tensors, digests of the base, and the gradients seen since."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..model.adapter import Adapter
from ..model.attach import adapters
from ..model.state import state_of
from ..model.stepping import follows
from .base_digest import base_digests


@dataclass
class Gradients:
    """The gradients of one declared tensor since the snapshot."""

    finite: bool = True
    count: int = 0
    nonzero: int = 0  # how many of them were not zero

    def see(self, parameter: Tensor) -> None:
        """Counts the current gradient of the parameter [...], if it has one."""
        if parameter.grad is not None:
            grad = parameter.grad.detach()
            self.count += 1
            self.finite &= bool(torch.isfinite(grad).all())
            self.nonzero += bool(grad.count_nonzero())


@dataclass
class Snapshot:
    """The state of a model at one moment.

    declared: copies of the declared tensors. base: digests of the base's bits. steps: the steps
    counted by adapters with a schedule, by the prefix of their tensors' keys. frozen: declared
    tensors that their method keeps unchanged at the moment. gradients: those seen since.
    """

    declared: dict[str, Tensor]
    base: dict[str, tuple[int, int]]
    steps: dict[str, int] = field(default_factory=dict)
    frozen: set[str] = field(default_factory=set)
    gradients: dict[str, Gradients] = field(default_factory=dict)
    hooks: list[Any] = field(default_factory=list)

    def release(self) -> None:
        """Stops watching gradients."""
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()


def snapshot(model: nn.Module, name: str | None = None) -> Snapshot:
    """Records the declared tensors of the adapter `name` (of all adapters if None) and the base,
    and watches gradients from now on.
    """
    declared = declared_tensors(model, name)
    shot = Snapshot(
        {k: p.detach().clone() for k, p in declared.items()},
        base_digests(model),
        _steps(model, name),
        frozen_tensors(model, name),
    )
    for key, parameter in declared.items():
        record = shot.gradients[key] = Gradients()
        if not parameter.requires_grad:
            continue  # frozen since attach, so the audit will say that no gradient reached it
        shot.hooks.append(parameter.register_post_accumulate_grad_hook(record.see))  # type: ignore[no-untyped-call]
    return shot


def declared_tensors(model: nn.Module, name: str | None) -> dict[str, nn.Parameter]:
    """Returns the trained parameters of the adapter `name`, or of all adapters, by key; without
    copies of whole numbers, which no gradient can reach.
    """
    return {
        f"{prefix}{key}": p
        for prefix, adapter in _by_prefix(model, name).items()
        for key, p in adapter.named_parameters()
        if p.is_floating_point()
    }


def frozen_tensors(model: nn.Module, name: str | None) -> set[str]:
    """Returns the keys of the declared tensors that their method keeps unchanged at the moment."""
    return {
        f"{prefix}{module}.{tensor}"
        for prefix, adapter in _by_prefix(model, name).items()
        for module, site in adapter.layers.items()
        for tensor in site.method.unmoved(site)
    }


def _by_prefix(model: nn.Module, name: str | None) -> dict[str, Adapter]:
    """The adapters by the prefix of their tensors' keys, which is empty if there is only one."""
    state = state_of(model)
    chosen = adapters(model) if name is None else {name: state.adapter(name)}
    return {
        "" if len(chosen) == 1 else f"{adapter}: ": handle for adapter, handle in chosen.items()
    }


def _steps(model: nn.Module, name: str | None) -> dict[str, int]:
    return {
        prefix: adapter.steps
        for prefix, adapter in _by_prefix(model, name).items()
        if follows(adapter) and any("step" in site.buffer_names for site in adapter.layers.values())
    }
