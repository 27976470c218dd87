"""Runs a model without the forward hooks that its user has put on it: a hook that counts or
collects must see the calls that the user makes, and no others.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

# Their hooks are part of how the model computes: sharded, pruned, offloaded or adapted weights.
_LIBRARIES = {
    "torch",
    "weft",
    "accelerate",
    "transformers",
    "transformers_modules",
    "deepspeed",
    "peft",
}
_GLOBAL = (torch_module._global_forward_pre_hooks, torch_module._global_forward_hooks)
_lock = threading.Lock()
_here = threading.local()


class _Quiet:
    """Stands in for a hook, and calls it unless this thread is inside `quiet`."""

    def __init__(self, hook: Any) -> None:
        self.hook, self.users = hook, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return None if getattr(_here, "depth", 0) else self.hook(*args, **kwargs)


@contextmanager
def quiet(module: nn.Module) -> Iterator[None]:
    """Lets this thread run a module without the user's hooks; other threads run it with them."""
    places: list[Any] = [*_GLOBAL]
    modules = set(module.modules())
    for m in modules:
        places += [d for d in (m._forward_pre_hooks, m._forward_hooks) if d]
    with _lock:
        stands = [pair for place in places for pair in _stand_ins(place, modules)]
    _here.depth = getattr(_here, "depth", 0) + 1
    try:
        yield
    finally:
        _here.depth -= 1
        with _lock:
            for place, key, stand in stands:
                stand.users -= 1
                if not stand.users and place.get(key) is stand:
                    place[key] = stand.hook


def _stand_ins(
    place: dict[int, Any], modules: Collection[nn.Module]
) -> Iterator[tuple[dict[int, Any], int, _Quiet]]:
    for key, hook in [*place.items()]:
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, nn.Module) and owner in modules:
            continue  # the model's own
        if isinstance(hook, _Quiet) or not _of_a_library(hook):
            stand = hook if isinstance(hook, _Quiet) else _Quiet(hook)
            stand.users += 1
            place[key] = stand
            yield place, key, stand


def _of_a_library(hook: Any) -> bool:
    """Whether the code of a hook belongs to one of these libraries."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    code = getattr(hook, "__func__", hook)
    if not hasattr(code, "__code__"):  # an object that can be called
        code = type(code).forward if isinstance(code, nn.Module) else type(code).__call__
    return str(getattr(code, "__module__", "")).partition(".")[0] in _LIBRARIES
