"""Which modules a configuration of peft adapts: target_modules, exclude_modules, layers_to_transform
and layers_pattern, by peft's own rules (0.21).

Weft reads the layers of a file from its tensors; these rules tell if some of them are missing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from ...errors import ConfigError
from ...model import base_layers
from ...model.structure import Structure, canonical


def picks_by_number(config: Mapping[str, Any]) -> bool:
    """Returns True if the configuration chooses layers by more than target_modules."""
    return any(
        config.get(field) not in (None, [], "")
        for field in ("layers_to_transform", "exclude_modules")
    )


def adapted_by(
    config: Mapping[str, Any],
) -> Callable[[Structure, Collection[str]], list[str]] | None:
    """Returns the function of a model, and of the tensors trained in full there, to the layers that
    peft adapts in it; None if the configuration does not say which.

    Raises ConfigError if a field has a type that peft does not write.
    """
    targets, exclude = config.get("target_modules"), config.get("exclude_modules")
    numbers = config.get("layers_to_transform")
    if not targets:
        return None
    wanted = [numbers] if type(numbers) is int else numbers or []
    if not isinstance(wanted, Sequence) or not all(type(n) is int for n in wanted):
        raise ConfigError(f"layers_to_transform={numbers!r}: whole numbers are expected.")
    stacks = _stacks(config.get("layers_pattern"))

    def adapted(structure: Structure, trained: Collection[str]) -> list[str]:
        return [
            name
            for name, layer in structure.layers.items()
            if f"{name}.weight" not in trained
            and base_layers.why_not(layer) is None
            and decide(canonical(name))
        ]

    def decide(name: str) -> bool:
        if exclude and _names(exclude, name):
            return False
        if not _names(targets, name):
            return False
        if not wanted or isinstance(targets, str):
            return True
        found = next((m for s in stacks if (m := re.match(s, name))), None)
        return found is not None and int(found["index"]) in wanted

    return adapted


def _stacks(pattern: Any) -> list[str]:
    """Expressions for the part of a name that ends in a block's number."""
    if not pattern:
        return [r".*?\.[^.]*\.(?P<index>\d+)\."]
    each = [pattern] if isinstance(pattern, str) else list(pattern)
    return [rf"(?:^|.*?\.){name}\.(?P<index>\d+)\." for name in each]


def _names(pattern: Any, name: str) -> bool:
    """Whether a string matches a whole name, or a list has an ending of it."""
    if isinstance(pattern, str):
        return re.fullmatch(pattern, name) is not None
    return any(name == ending or name.endswith(f".{ending}") for ending in pattern)
