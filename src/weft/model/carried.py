"""What an adapted module carries: a subclass of its own class, and the container of its adapters.

The class is swapped and the container added in place; `restore` undoes both. A module of fused
experts holds several layers, so its container has one inside for each of their parameters.
"""

from __future__ import annotations

import types
from typing import Any

from torch import nn

from .active import ROWS_FOUND, ActiveAdapters
from .base_layers import INNER_FORWARD, own_class
from .offload import HOOK, OLD_FORWARD, offloads

CHILD = "weft"
ACTIVE = "_weft_active"
_HOOKS = "_weft_hooks"
_FORGET = "_weft_forget"


def is_adapted(module: nn.Module) -> bool:
    """Whether a module carries adapters, as an adapted layer or as the place of a prompt."""
    return ACTIVE in module.__dict__


def adapt(module: nn.Module, active: ActiveAdapters, adapted: type[nn.Module]) -> None:
    """Swaps the class for `adapted`, a subclass of it, and adds the container of layers; nothing
    else of the module changes.
    """
    module.__dict__[ACTIVE] = active
    cls, inner = type(module), None
    if OLD_FORWARD in module.__dict__ and HOOK in module.__dict__:
        # accelerate's hooks load the weight only inside their forward, so ours goes inside it
        inner = module.__dict__[OLD_FORWARD]
        module.__dict__[OLD_FORWARD] = types.MethodType(adapted.forward, module)
    elif "forward" in module.__dict__:  # another library's, which is kept inside ours
        inner = module.__dict__.pop("forward")
    if inner is not None and getattr(inner, "__func__", None) is not cls.forward:
        module.__dict__[INNER_FORWARD] = inner
    module.add_module(CHILD, nn.ModuleDict())
    module.__class__ = adapted
    if offloads(module):
        forget_offloaded(module)


def adopt(module: nn.Module, active: ActiveAdapters, before: Any = None) -> None:
    """Adds the container to a module that keeps its class and forward; `before` hooks its input."""
    module.__dict__[ACTIVE] = active
    module.__dict__[_HOOKS] = (
        [module.register_forward_pre_hook(before, with_kwargs=True)] if before is not None else []
    )
    module.add_module(CHILD, nn.ModuleDict())


def restore(module: nn.Module) -> None:
    """Undoes `adapt` or `adopt`: the same class, the same children, the same instance
    attributes.
    """
    if _HOOKS in module.__dict__:
        for hook in module.__dict__.pop(_HOOKS):
            hook.remove()
    else:
        adapted = type(module).forward
        module.__class__ = own_class(module)
        inner = module.__dict__.pop(INNER_FORWARD, None)
        if getattr(module.__dict__.get(OLD_FORWARD), "__func__", None) is adapted:
            module.__dict__[OLD_FORWARD] = inner or types.MethodType(type(module).forward, module)
        elif inner is not None:
            module.__dict__["forward"] = inner
        if _FORGET in module.__dict__:
            module.__dict__.pop(_FORGET).remove()
    del module.__dict__[ACTIVE]
    module.__dict__.pop(ROWS_FOUND, None)
    del module._modules[CHILD]


def forget_offloaded(module: nn.Module) -> None:
    """Lets an adapted layer whose weight is offloaded keep nothing of it after a forward."""
    if _FORGET not in module.__dict__:
        module.__dict__[_FORGET] = module.register_forward_hook(_forget)


def _forget(module: nn.Module, args: Any, out: Any) -> None:
    layers: dict[str, Any] = dict(module_dict(module)._modules)
    for layer in layers.values():
        each: list[Any] = list(layer.values()) if isinstance(layer, nn.ModuleDict) else [layer]
        for one in each:
            one.forget()


def put(layer: Any, name: str) -> None:
    """Puts an adapter's layer into its adapted module."""
    container: Any = module_dict(_carrier(layer))
    slot = getattr(layer.base, "slot", None)
    if slot is not None:
        if slot not in container:
            container[slot] = nn.ModuleDict()
        container = container[slot]
    container[name] = layer


def take_out(layer: Any, name: str) -> None:
    """Takes it out again. The module is restored with its last layer."""
    container: Any = module_dict(_carrier(layer))
    slot = getattr(layer.base, "slot", None)
    within = container if slot is None else container[slot]
    del within[name]
    if slot is not None and not len(within):
        del container[slot]
    if not len(container):
        restore(_carrier(layer))


def _carrier(layer: Any) -> nn.Module:
    found: nn.Module = getattr(layer.base, "host", layer.base.module)
    return found


def layers_of(module: nn.Module, tensor: str = "weight") -> nn.ModuleDict:
    """Returns the adapters by name of a module, or of one of its parameters that are layers of
    their own. Raises TypeError if it carries none.
    """
    container: Any = module_dict(module)
    return container[tensor] if tensor != "weight" else container  # type: ignore[no-any-return]


def module_dict(module: nn.Module) -> nn.ModuleDict:
    """Returns what holds an adapted module's layers. Raises TypeError if there is nothing."""
    container = module._modules[CHILD]
    if not isinstance(container, nn.ModuleDict):
        raise TypeError(f"{type(module).__name__}.{CHILD} is not Weft's")
    return container


def active_of(module: nn.Module) -> ActiveAdapters | None:
    """Returns the object that an adapted layer reads; None for any other module."""
    return module.__dict__.get(ACTIVE)
