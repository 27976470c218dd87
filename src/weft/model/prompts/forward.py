"""The arguments and the code of a module's forward."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn


def forward_of(cls: type[nn.Module]) -> Any:
    """Returns the forward that a class was written with, without decorators."""
    return inspect.unwrap(cls.forward)


def parameters_of(cls: type[nn.Module]) -> tuple[str, ...]:
    """Returns the names of a forward's arguments, in order."""
    return tuple(inspect.signature(cls.forward).parameters)[1:]


def code_names(cls: type[nn.Module]) -> tuple[str, ...]:
    """Returns the global and attribute names that a forward uses."""
    code = getattr(forward_of(cls), "__code__", None)
    return tuple(code.co_names) if code is not None else ()


def arguments_by_name(
    names: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns all arguments of a forward by name."""
    return {**dict(zip(names, args, strict=False)), **kwargs}


def looks_back(cls: type[nn.Module]) -> bool:
    """Returns True if each token attends only to those before it, in every configuration."""
    names = code_names(cls)
    return "create_causal_mask" in names and "is_decoder" not in names
