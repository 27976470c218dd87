"""Detaches adapters: the model is as it was before."""

from __future__ import annotations

from torch import nn

from ..errors import MergeError
from ..methods.base import PromptMethod
from . import held, packed_merge, prompts, statistics
from .adapter import Adapter
from .carried import take_out
from .saving import tell_trainers
from .selected import give_back
from .state import ATTRIBUTE, State, state_of
from .stepping import unfollow
from .use import check_not_in_use


def detach(model: nn.Module, name: str = "default", keep_merged: bool = False) -> None:
    """Detaches an adapter: the model has the modules, keys, flags and outputs that it had before.

    If it was the active adapter, the base becomes active. keep_merged=True drops a merged adapter
    and leaves its effective weights in the model permanently. Raises WeftError (no such adapter, or
    an open `with weft.use(...)` uses it), MergeError (it is merged and keep_merged was not given).
    """
    state = state_of(model)
    with state.gate.alone(f"detach adapter {name!r}"):
        _detach(state, state.adapter(name), keep_merged)


def _detach(state: State, adapter: Adapter, keep_merged: bool) -> None:
    name = adapter.name
    check_not_in_use(state, name)
    record = state.merged
    if record is not None and (record.name != name or not keep_merged):
        raise MergeError(
            f"adapter {record.name!r} is merged. Call weft.unmerge(model) first, or "
            f"weft.detach(model, {record.name!r}, keep_merged=True) to keep its weights."
        )
    give_back(state.root, adapter.selected_tensors.values())
    if record is not None:
        state.end_merge()
    state.forget(name)
    remove(state, adapter)
    del state.adapters[name]
    if record is not None:
        packed_merge.keep(state.root, record, state.adapters.values())
    state.active.names.pop(name, None)
    state.active.versions.pop(name, None)
    state.wiring.note(state)
    if not state.adapters:
        for full, parameter in state.root.named_parameters():
            parameter.requires_grad_(state.required_grad.get(full, parameter.requires_grad))
        state.fast_paths.restore()
        state.unwatch_root()
        tell_trainers(state.root, False)
        del state.root.__dict__[ATTRIBUTE]


def remove(state: State, adapter: Adapter) -> None:
    """Takes the adapter's layers, hooks and base tensors out of the model; its name stays."""
    if state._installed == adapter.name:
        state.install(None)
    if isinstance(adapter.config, PromptMethod):
        prompts.uninstall(state, adapter)
    for layer in adapter.every_layer().values():
        take_out(layer, adapter.name)
        held.let_go(layer)
    state.active.marked.discard(adapter.name)
    state.active.forget_calls()
    others = [other for other in state.adapters.values() if other is not adapter]
    if not any(other.selected_tensors for other in others):
        state.unguard()
    if not any(other.config.freeze_batch_norm for other in others):
        statistics.release(statistics.with_statistics(state.root).values())
    unfollow(adapter)
    state.uncalled.drop(adapter.name)
