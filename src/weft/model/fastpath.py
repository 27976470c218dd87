"""Parents that read a layer's weight instead of calling the layer, which would silently ignore its
adapter.

In eval mode without gradients nn.TransformerEncoderLayer passes the weights of its linear layers to
one fused kernel. torch does not take that path if a module inside has a forward hook; so each such
parent gets one that does nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from torch import nn


class FastPaths:
    """The fast paths that are switched off, for `restore`."""

    def __init__(self) -> None:
        self._hooks: dict[nn.Module, Any] = {}
        self._nested: list[nn.TransformerEncoder] = []

    def switch_off(self, modules: Iterable[nn.Module], adapted: Collection[nn.Module]) -> None:
        """Switches off every parent among `modules` that contains an adapted layer."""
        adapted_set = set(adapted)
        for module in modules:
            if not isinstance(module, nn.TransformerEncoderLayer | nn.TransformerEncoder):
                continue
            if module in self._hooks or adapted_set.isdisjoint(module.modules()):
                continue
            if isinstance(module, nn.TransformerEncoderLayer):
                self._hooks[module] = module.register_forward_pre_hook(_nothing)
            elif module not in self._nested and getattr(module, "use_nested_tensor", False):
                module.use_nested_tensor = False  # nested tensors are for the fused kernel only
                self._nested.append(module)

    def restore(self) -> None:
        """Switches all fast paths on again."""
        for hook in self._hooks.values():
            hook.remove()
        for encoder in self._nested:
            encoder.use_nested_tensor = True
        self._hooks.clear()
        self._nested.clear()


def _nothing(module: nn.Module, args: Any) -> None:
    return None
