"""Batch norms of the frozen base: `freeze_batch_norm=True` keeps their running statistics.

In training mode a batch norm normalises with the batch and moves `running_mean` and `running_var`,
which no adapter file contains. A frozen one stays in evaluation mode through `model.train()`: its
class is swapped for a subclass (swapped.py), as a layer's is, so there is no work in its forward.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from .base_layers import own_class
from .swapped import Subclasses

_MODE = "_weft_mode"  # what model.train(mode) said last


def with_statistics(root: nn.Module) -> dict[str, nn.Module]:
    """Returns the modules that keep running statistics, frozen or not, by name."""
    return {
        name: module
        for name, module in root.named_modules()
        if module._buffers.get("running_mean") is not None
    }


@contextmanager
def modes_kept(root: nn.Module) -> Iterator[None]:
    """After this context every module has the mode (train or eval) that it had, and a frozen batch
    norm the one that `release` gives it.
    """
    before = [(m, m.training, m.__dict__.get(_MODE)) for m in root.modules()]
    try:
        yield
    finally:
        for module, mode, said in before:
            module.training = mode
            if said is not None and _MODE in module.__dict__:
                module.__dict__[_MODE] = said


@contextmanager
def in_eval(root: nn.Module) -> Iterator[None]:
    """Inside this context, every module of the model is in eval mode."""
    with modes_kept(root):
        root.eval()
        yield


def moving(root: nn.Module) -> list[str]:
    """Returns the names of those whose statistics move when the model trains. The mode is restored."""
    with modes_kept(root):
        root.train()
        return [name for name, module in with_statistics(root).items() if module.training]


def freeze(modules: Iterable[nn.Module]) -> None:
    """Puts modules into evaluation mode, in which they stay until `release`."""
    for module in modules:
        if _MODE not in module.__dict__:
            module.__dict__[_MODE] = module.training
            module.__class__ = _frozen.of(type(module))
            module.training = False


def thawed(root: nn.Module) -> dict[str, nn.Module]:
    """Returns those that keep running statistics and are not frozen, by name."""
    return {n: m for n, m in with_statistics(root).items() if _MODE not in m.__dict__}


def release(modules: Iterable[nn.Module]) -> None:
    """Undoes `freeze`: the module's own class, and the mode that the model has now."""
    for module in modules:
        if _MODE in module.__dict__:
            module.__class__ = own_class(module)
            module.training = module.__dict__.pop(_MODE)


def _train(self: nn.Module, mode: bool = True) -> nn.Module:
    self.__dict__[_MODE] = bool(mode)
    return own_class(self).train(self, False)


def _blank(base: type[nn.Module]) -> nn.Module:
    return _frozen.blank(base)


_frozen = Subclasses("Frozen", _blank, train=_train)
