"""Layers whose weights accelerate keeps on the CPU or the disk and loads only inside their forward:
`cpu_offload`, `disk_offload`, and a `device_map` with "cpu" or "disk".

Such a layer runs its adapters inside accelerate's forward, where its weight is there. The adapters'
own tensors are small and stay on the device that the layer computes on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TargetError
from ..methods.base import PromptMethod
from . import base_layers

HOOK, OLD_FORWARD = "_hf_hook", "_old_forward"  # where accelerate keeps the hook, and what it wraps


def offloads(module: nn.Module) -> bool:
    """Whether a hook of accelerate on this module takes its tensors away after every forward."""
    return any(getattr(one, "offload", False) is True for one in _hooks(module))


def _hooks(module: nn.Module) -> tuple[Any, ...]:
    hook: Any = module.__dict__.get(HOOK)
    return tuple(getattr(hook, "hooks", (hook,)))  # a SequentialHook has several


def stored(module: nn.Module, tensor: str) -> Tensor | None:
    """Returns where accelerate keeps a tensor [...] of an offloaded module, on the CPU; None if it
    does not.
    """
    for hook in _hooks(module):
        if getattr(hook, "offload", False) is True:
            found: Tensor | None = hook.weights_map[tensor]
            return found
    return None


def device_of(module: nn.Module) -> torch.device:
    """Returns the device on which a module computes: that of its first parameter there."""
    with loaded(module):
        return next((p.device for p in module.parameters()), torch.device("cpu"))


@contextmanager
def loaded(module: nn.Module) -> Iterator[None]:
    """Has an offloaded module's tensors on the device that it computes on; else does nothing."""
    if not offloads(module):
        yield
        return
    hook: Any = module.__dict__[HOOK]
    with torch.no_grad():
        hook.pre_forward(module)
    try:
        yield
    finally:
        with torch.no_grad():
            hook.post_forward(module, None)


def take_back(layer: nn.Module) -> bool:
    """Takes the tensors of an adapter's layer back from accelerate, which was put on the model
    after attach. Returns whether there was something to take back.
    """
    found = [module for module in layer.modules() if offloads(module)]
    for module in found:
        device = next(
            (d for h in _hooks(module) if (d := getattr(h, "execution_device", None)) is not None),
            None,
        )
        module.__dict__[HOOK].detach_hook(module)
        for name in (HOOK, OLD_FORWARD, "forward"):
            module.__dict__.pop(name, None)
        if device is not None:
            module.to(device)
    return bool(found)


def check_loadable(root: nn.Module, configs: Mapping[str, Any], selected: Sequence[str]) -> None:
    """Raises TargetError if a layer to adapt, the place of a prompt, or a base tensor to train as a
    copy is offloaded in a way in which its tensors cannot be had.
    """
    others = [name for name, method in configs.items() if isinstance(method, PromptMethod)]
    layers = [name for name in configs if name not in others]
    others += [tensor.rpartition(".")[0] for tensor in selected]
    modules: dict[str, Any] = {**base_layers.carriers(dict(root.named_modules()))}
    for name in others:
        module, _ = base_layers.holder(modules[name])
        part = next((m for m in module.modules() if offloads(m)), None)
        if part is not None or _around(modules, name):
            raise TargetError(
                f"{name!r} is offloaded by accelerate (cpu_offload, disk_offload or device_map), and its "
                "tensors are read or trained between forwards. Keep it on a device, or load the model whole."
            )
    held = [name for name in layers if isinstance(modules[name], base_layers.HeldWeight)]
    for name in held:
        both, outer = (modules[name].host, modules[name].holder), name.rpartition(".")[0]
        if any(offloads(m) for m in both) or _around(modules, outer):
            raise TargetError(
                f"{name!r} is offloaded by accelerate (cpu_offload, disk_offload or device_map), and the "
                "module that reads it has it only in parts of its forward. Keep it on a device."
            )
    for name in [name for name in layers if name not in held]:
        weight: Any = modules[name]._parameters.get("weight")
        around = _around(modules, name)
        if (
            around is not None
            and weight is not None
            and weight.is_meta
            and not offloads(modules[name])
        ):
            raise TargetError(
                f"{name!r} is offloaded by accelerate together with {around!r}, which loads only the tensors "
                "that it had. Leave preload_module_classes out, or attach first."
            )


def _around(modules: dict[str, Any], name: str) -> str | None:
    """The module around this one that loads its tensors, too."""
    parts = name.split(".")
    outer = (".".join(parts[:i]) for i in range(len(parts)))
    return next(
        (
            o
            for o in outer
            for hook in _hooks(modules[o])
            if getattr(hook, "offload", False) is True and getattr(hook, "place_submodules", False)
        ),
        None,
    )
