"""Attaches the prompts of an adapter to their modules, and removes them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..adapter import Adapter
from ..carried import adopt, is_adapted
from ..state import State, find_state
from ..structure import Structure
from . import attention
from .hooks import VirtualTokenHooks
from .injection import injection_point
from .places import PromptHost


def install(state: State, adapter: Adapter, structure: Structure) -> None:
    """Attaches an adapter's prompts to their modules, which keep their class and forward."""
    config = adapter.config
    if state.virtual is None:
        point = injection_point(structure)
        if point is not None and (config.where != "attention" or point.decoder):
            state.virtual = VirtualTokenHooks(point, state.active)
    hooks: VirtualTokenHooks | None = state.virtual
    if hooks is not None:
        hooks.add(adapter.name, config)
    before = {
        "attention": attention.check,
        "block": hooks.replace_states if hooks is not None else None,
    }.get(config.where)
    for layer in adapter.layers.values():
        if not is_adapted(layer.base.module):
            adopt(layer.base.module, state.active, before)
    if config.where == "attention":
        attention.claim(_attentions(adapter))


def uninstall(state: State, adapter: Adapter) -> None:
    """Undoes `install`, except for the adapter's layers, which the caller removes."""
    hooks: VirtualTokenHooks | None = state.virtual
    if hooks is not None:
        hooks.drop(adapter.name)
        if not hooks.configs:
            hooks.close()
            state.virtual = None
    if adapter.config.where == "attention":
        others = [other for other in state.adapters.values() if other is not adapter]
        still = [m for other in others for m in _attentions(other)]
        attention.release(_attentions(adapter), still)


@contextmanager
def answering(model: nn.Module, labels: Tensor | None) -> Iterator[None]:
    """Inside this context, virtual tokens take the end of the prompt from these labels [rows,
    tokens], for a forward that is called without labels.
    """
    state = find_state(model)
    hooks: VirtualTokenHooks | None = state.virtual if state is not None else None
    if hooks is None or not hooks.next_token:
        yield
        return
    hooks.outside_labels = labels
    try:
        yield
    finally:
        hooks.outside_labels = None


def virtual_positions(structure: Structure, config: Any) -> int:
    """Returns how many of a model's positions the virtual tokens of a configuration take: none in
    an encoder, which they enter behind the position embedding, and none without virtual tokens.
    """
    where = getattr(config, "where", None)
    point = None if where is None else injection_point(structure)
    if point is None or not point.decoder:
        return 0
    return int(config.shift if where == "attention" else config.l_p + config.l_i)


def _attentions(adapter: Adapter) -> list[nn.Module]:
    hosts = [layer.base for layer in adapter.layers.values()]
    return [h.module for h in hosts if isinstance(h, PromptHost) and h.where == "attention"]
