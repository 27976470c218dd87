"""Names in a file and names in a model: the same, or the same but for what known wrappers add."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from torch import nn

from ..model.structure import WRAPPERS, canonical

NESTED = "language_model"
_LEADING = re.compile(r"((module|base_model\.model)\.)+")


@dataclass
class Names:
    """File name -> model name of every module that was found, what is missing, and what had to be
    mapped.
    """

    found: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    @property
    def mapped(self) -> list[str]:
        """What differs between the names of the file and the model's, once for all layers."""
        return sorted({_change(a, b) for a, b in self.found.items() if a != b})


def is_wrapper(module: nn.Module) -> bool:
    """torch.compile's, FSDP's or activation checkpointing's, around the module that has the
    tensors.
    """
    return any(isinstance(module._modules.get(part), nn.Module) for part in WRAPPERS)


def bare(model: nn.Module) -> nn.Module:
    """The model within such wrappers of the whole of it."""
    while is_wrapper(model):
        model = next(inner for part in WRAPPERS if (inner := model._modules.get(part)) is not None)
    return model


def class_of(model: nn.Module) -> type[nn.Module]:
    """The user's own class, where Weft (on an adapted layer) or FSDP has put a subclass in its
    place.
    """
    return next(
        cls
        for cls in type(bare(model)).__mro__
        if "_weft_base" not in vars(cls) and not cls.__name__.startswith("FSDP")
    )


def match(wanted: Collection[str], have: Collection[str]) -> Names:
    """Find every wanted name: as it is; else without wrappers; else without a `language_model.`
    nesting on either side.

    One rule serves all names: the first under which all are found, else the one that finds most.
    """
    best = Names(missing=list(wanted))
    for rule in (str, _unwrapped, _flattened, _inner):
        names = _by(rule, wanted, have)
        if len(names.missing) < len(best.missing):
            best = names
        if not best.missing:
            break
    return best


def _by(rule: Callable[[str], str], wanted: Collection[str], have: Collection[str]) -> Names:
    index: dict[str, list[str]] = {}
    for name in have:
        index.setdefault(rule(name), []).append(name)
    out = Names()
    for name in wanted:
        places = index.get(rule(name), [])
        if name in places or len(places) == 1:
            out.found[name] = name if name in places else places[0]
        else:  # none, or more than one that it could be
            out.missing.append(name)
    return out


def _change(a: str, b: str) -> str:
    """The parts in which two names differ, with layer numbers left open."""
    left, right = a.split("."), b.split(".")
    while left and right and left[-1] == right[-1]:
        left.pop()
        right.pop()
    old, new = (
        re.sub(r"(^|\.)\d+(?=\.)", r"\1#", ".".join([*parts, "*"])) for parts in (left, right)
    )
    return f"{old} in the file is {new} in the model"


def _unwrapped(name: str) -> str:
    name = canonical(name)
    leading = _LEADING.match(name)
    return name[leading.end() :] if leading else name


def _flattened(name: str) -> str:
    return ".".join(part for part in _unwrapped(name).split(".") if part != NESTED)


def _inner(name: str) -> str:
    """The name within the nested model, for adapters that were saved from it or are loaded into
    it.
    """
    parts = _unwrapped(name).split(".")
    return ".".join(parts[parts.index(NESTED) + 1 :]) if NESTED in parts else ".".join(parts)
