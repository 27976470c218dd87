"""Which modules a configuration of peft adapts: target_modules, exclude_modules,
layers_to_transform and layers_pattern, by peft's own rules (0.21).

Weft reads the layers of a file from its tensors; these rules tell if some of them are missing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from ...errors import ConfigError
from ...model import base_layers
from ...model.structure import Structure, canonical
from ...model.structure.names import matches
from ...untrusted.json_text import shortened


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
    exclude, numbers = config.get("exclude_modules"), config.get("layers_to_transform")
    if not config.get("target_modules"):
        return None
    targets = _Names("target_modules", config["target_modules"])
    excluded = _Names("exclude_modules", exclude) if exclude else None
    wanted = [numbers] if type(numbers) is int else numbers or []
    if not isinstance(wanted, Sequence) or not all(type(n) is int for n in wanted):
        raise ConfigError(f"layers_to_transform={shortened(numbers)}: whole numbers are expected.")
    number_of = _numbers(config.get("layers_pattern"))

    def adapted(structure: Structure, trained: Collection[str]) -> list[str]:
        return [
            name
            for name, layer in structure.layers.items()
            if f"{name}.weight" not in trained
            and name in structure.modules
            and base_layers.why_not(layer) is None
            and decide(canonical(name))
        ]

    def decide(name: str) -> bool:
        if excluded is not None and name in excluded:
            return False
        if name not in targets:
            return False
        return not wanted or targets.is_expression or number_of(name) in wanted

    return adapted


class _Names:
    """The names that a field chooses: by an expression over the whole name, or a list of endings.

    Raises ConfigError if it is neither.
    """

    def __init__(self, field: str, value: Any) -> None:
        self.field, self.value, self.is_expression = field, value, isinstance(value, str)
        if not self.is_expression:
            _check_list(field, value)
            self.endings = frozenset(value)

    def __contains__(self, name: str) -> bool:
        if self.is_expression:
            return matches(self.field, self.value, name)
        parts = name.split(".")
        return any(".".join(parts[i:]) in self.endings for i in range(len(parts)))


def _numbers(pattern: Any) -> Callable[[str], int | None]:
    """Returns the function of a layer's name to the number of its block, by `layers_pattern`: the
    first number after one of these names of a stack, or without them after any two names.

    Raises ConfigError if it has another type.
    """
    stacks = [pattern] if isinstance(pattern, str) and pattern else pattern or []
    _check_list("layers_pattern", stacks)

    def number_of(name: str) -> int | None:
        parts = name.split(".")
        for place in range(1, len(parts) - 1):
            if not parts[place].isdecimal():
                continue
            before = ".".join(parts[:place])
            if not stacks and place >= 2:
                return int(parts[place])
            if any(matches("layers_pattern", rf"(?:.*\.)?(?:{s})", before) for s in stacks):
                return int(parts[place])
        return None

    return number_of


def _check_list(field: str, value: Any) -> None:
    if not isinstance(value, Sequence | set) or not all(isinstance(v, str) for v in value):
        raise ConfigError(f"{field}={shortened(value)}: a text or a list of texts is expected.")
