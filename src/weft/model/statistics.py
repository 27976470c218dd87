"""Batch norms of the frozen base: `freeze_batch_norm=True` keeps their running statistics.

In training mode a batch norm normalises with the batch and moves `running_mean` and `running_var`,
which no adapter file contains. A frozen one stays in evaluation mode through `model.train()`: its
class is swapped for a subclass, as in layer.py, so there is no work in its forward.
"""

from __future__ import annotations

import types
from collections.abc import Iterable
from typing import Any

from torch import nn

_MODE = "_weft_mode"  # what model.train(mode) said last
_classes: dict[type[nn.Module], type[nn.Module]] = {}


def with_statistics(root: nn.Module) -> dict[str, nn.Module]:
    """Returns the modules that keep running statistics, frozen or not, by name."""
    return {
        name: module
        for name, module in root.named_modules()
        if module._buffers.get("running_mean") is not None
    }


def moving(root: nn.Module) -> list[str]:
    """Returns the names of those whose statistics move when the model trains. The mode is restored."""
    before = {module: module.training for module in root.modules()}
    root.train()
    found = [name for name, module in with_statistics(root).items() if module.training]
    for module, mode in before.items():
        module.training = mode
    return found


def freeze(modules: Iterable[nn.Module]) -> None:
    """Puts modules into evaluation mode, in which they stay until `release`."""
    for module in modules:
        if _MODE not in module.__dict__:
            module.__dict__[_MODE] = module.training
            module.__class__ = _frozen_class(type(module))
            module.training = False


def release(modules: Iterable[nn.Module]) -> None:
    """Undoes `freeze`: the module's own class, and the mode that the model has now."""
    for module in modules:
        if _MODE in module.__dict__:
            module.__class__ = type(module)._weft_base  # type: ignore[attr-defined]
            module.training = module.__dict__.pop(_MODE)


def _train(self: nn.Module, mode: bool = True) -> nn.Module:
    self.__dict__[_MODE] = bool(mode)
    type(self)._weft_base.train(self, False)  # type: ignore[attr-defined]
    return self


def _blank(base: type[nn.Module]) -> nn.Module:
    cls = _frozen_class(base)
    return cls.__new__(cls)


def _reduce(self: nn.Module, protocol: Any) -> Any:
    return _blank, (type(self)._weft_base,), self.__dict__  # type: ignore[attr-defined]


def _frozen_class(base: type[nn.Module]) -> type[nn.Module]:
    if base not in _classes:
        body = {
            "_weft_base": base,
            "train": _train,
            "__reduce_ex__": _reduce,
            "__module__": base.__module__,
            "__doc__": base.__doc__,
        }
        _classes[base] = types.new_class(
            f"Frozen{base.__name__}", (base,), exec_body=lambda names: names.update(body)
        )
    return _classes[base]
