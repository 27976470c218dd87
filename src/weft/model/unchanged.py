"""Runs a model and puts back all that a forward sets on it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_PACKED = 1 << 20  # numbers of an integer buffer from which on it is a weight
_COLLECTIONS = (dict, list, set)


@contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """Switches gradients and training mode off, and afterwards restores every module's attributes,
    what its dictionaries, lists and sets hold (hooks too), and the numbers in its buffers.
    """
    modules = list(module.modules())
    before = [_Attributes(m.__dict__) for m in modules]
    buffers = [(b, b._version, b.clone()) for m in modules for b in _own_buffers(m)]
    with torch.no_grad():
        try:
            for m in modules:
                m.training = False
            yield
        finally:
            for attributes in before:
                attributes.restore()
            for buffer, version, numbers in buffers:
                if buffer._version != version:
                    buffer.copy_(numbers)


class _Attributes:
    def __init__(self, place: dict[str, Any]) -> None:
        self._place, self._values = place, dict(place)
        self._held: list[tuple[Any, Any]] = [
            (v, v.copy()) for v in place.values() if isinstance(v, _COLLECTIONS)
        ]

    def restore(self) -> None:
        for value, held in self._held:
            if isinstance(value, dict):
                _restore(value, held)
            elif len(value) != len(held) or any(
                a is not b for a, b in zip(value, held, strict=True)
            ):
                value.clear()
                (value.extend if isinstance(value, list) else value.update)(held)
        _restore(self._place, self._values)


def _restore(now: dict[Any, Any], before: Mapping[Any, Any]) -> None:
    """Puts entries back one by one: other threads may read them."""
    for key in [key for key in now if key not in before]:
        del now[key]
    for key, value in before.items():
        if key not in now or now[key] is not value:
            now[key] = value


def _own_buffers(module: nn.Module) -> list[Tensor]:
    """The buffers that the model's own forward may write to; not the packed weights of a quantised
    one, whose copies would double the model's memory.
    """
    if type(module).__module__.startswith("weft."):
        return []
    found = (b for b in module._buffers.values() if b is not None and not b.is_inference())
    return [b for b in found if b.is_floating_point() or b.numel() <= _PACKED]
