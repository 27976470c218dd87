"""What other savers write of a model with adapters: a merged state says so, and `save_pretrained`
warns.

A `state_dict()` taken while an adapter is merged has W' in the place of W. Loaded into a model in
which the adapter is attached, it would count twice.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..errors import MergeError
from .active import STATE

MERGED = "merged.weft."  # begins the key by which a state_dict names the merged adapter
_SAVE = "save_pretrained"
_SIGN = "_hf_peft_config_loaded"


def note_merged(found: dict[str, Any], prefix: str, name: str) -> None:
    """Adds the merged adapter's name to a state_dict: a key whose value, [1], says nothing."""
    found[f"{prefix}{MERGED}{name}"] = torch.ones(1)


def check_merged(found: dict[str, Any], prefix: str, here: str | None) -> None:
    """Takes the note of `note_merged` out of a state_dict. Raises MergeError if it was taken while
    another adapter was merged than the one that is merged `here`.
    """
    for key in [key for key in found if key.startswith(prefix + MERGED)]:
        del found[key]
        name = key.removeprefix(prefix + MERGED)
        if name == here:
            continue
        raise MergeError(
            f"this state_dict was taken while adapter {name!r} was merged, so its weights are W' and no "
            "longer those of the base: here the adapter would count twice. Call weft.unmerge(model) "
            "before state_dict(), or load it into the base model after "
            f"weft.detach(model, {name!r}, keep_merged=True) there."
        )


def tell_trainers(root: nn.Module, attached: bool) -> None:
    """transformers.Trainer and TRL refuse a quantised model unless they see this sign of an
    adapter.
    """
    if not attached:
        root.__dict__.pop(_SIGN, None)
    elif getattr(root, "is_quantized", False):
        root.__dict__[_SIGN] = True


def watch_savers(root: nn.Module) -> None:
    """Lets `save_pretrained` of the model, and of the models in it, warn."""
    for module in _savers(root):
        if _SAVE not in module.__dict__:
            module.__dict__[_SAVE] = functools.partial(_save_pretrained, root, module)


def unwatch_savers(root: nn.Module) -> None:
    """Undoes `watch_savers`."""
    for module in _savers(root):
        found = module.__dict__.get(_SAVE)
        if isinstance(found, functools.partial) and found.func is _save_pretrained:
            del module.__dict__[_SAVE]


def _savers(root: nn.Module) -> Iterator[nn.Module]:
    return (module for module in root.modules() if callable(getattr(type(module), _SAVE, None)))


def _save_pretrained(root: nn.Module, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    state: Any = root.__dict__.get(STATE)
    names = [] if state is None else list(state.adapters)
    if state is not None and state.merged is not None:
        name = state.merged.name
        warnings.warn(
            f"save_pretrained writes the weights with adapter {name!r} merged into them, and the tensors "
            f"of {names} beside them. Call weft.detach(model, {name!r}, keep_merged=True) first to write "
            "the merged model alone.",
            stacklevel=2,
        )
    elif names:
        warnings.warn(
            f"save_pretrained writes the whole model, and from_pretrained will load it as the base without "
            f"adapter {', '.join(map(repr, names))}. Write an adapter with weft.save(model, directory, "
            f"name={names[-1]!r}); or put it into the weights with weft.merge and weft.detach(..., "
            "keep_merged=True), then call save_pretrained.",
            stacklevel=2,
        )
    save: Any = getattr(type(module), _SAVE)
    seen = module.__dict__.pop(_SIGN, None)  # with it transformers would look for a peft adapter
    try:
        return save(module, *args, **kwargs)
    finally:
        if seen is not None:
            module.__dict__[_SIGN] = seen
