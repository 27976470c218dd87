"""The base model's own modules and parameters, without those that Weft has added."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import accumulate

from torch import nn

from ..carried import CHILD, is_adapted


def base_modules(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`root.named_modules()` without the modules of adapters."""
    ours = _ours(root)
    for name, module in root.named_modules():
        if not _inside(name, ours):
            yield name, module


def base_parameters(
    root: nn.Module, repeat_tied: bool = False
) -> Iterator[tuple[str, nn.Parameter]]:
    """`root.named_parameters()` without the parameters of adapters.

    A tied parameter comes once, under its first name, or under each name if `repeat_tied`.
    """
    ours = _ours(root)
    for name, parameter in root.named_parameters(remove_duplicate=not repeat_tied):
        if not _inside(name, ours):
            yield name, parameter


def _ours(root: nn.Module) -> set[str]:
    return {
        f"{name}.{CHILD}".lstrip(".")
        for name, module in root.named_modules(remove_duplicate=False)
        if is_adapted(module)
    }


def _inside(name: str, containers: Collection[str]) -> bool:
    """Returns True if the name is one of many containers or is inside one."""
    return bool(containers) and any(
        part in containers for part in accumulate(name.split("."), "{}.{}".format)
    )
