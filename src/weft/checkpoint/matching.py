"""Matches the names in a file with those in a model, which may differ by what known wrappers add."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..model.structure import WRAPPERS, canonical

NESTED = "language_model"
_LEADING = re.compile(r"((module|base_model\.model)\.)+")


@dataclass
class Names:
    """Model names by the file's names, and the file's names that the model does not have."""

    found: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    @property
    def mapped(self) -> list[str]:
        """The differences between the file's names and the model's, once for all layers."""
        return sorted({_change(a, b) for a, b in self.found.items() if a != b})


def is_wrapper(module: nn.Module) -> bool:
    """Returns True for a module of torch.compile, FSDP or activation checkpointing around another."""
    return any(isinstance(module._modules.get(part), nn.Module) for part in WRAPPERS)


def bare(model: nn.Module) -> nn.Module:
    """Returns the model without wrappers around the whole of it."""
    while is_wrapper(model):
        model = next(inner for part in WRAPPERS if (inner := model._modules.get(part)) is not None)
    return model


def class_of(model: nn.Module) -> type[nn.Module]:
    """Returns the user's own class, if Weft (on an adapted layer) or FSDP has installed a subclass."""
    return next(
        cls
        for cls in type(bare(model)).__mro__
        if "_weft_base" not in vars(cls) and not cls.__name__.startswith("FSDP")
    )


def architecture(root: nn.Module) -> dict[str, Any]:
    """Returns what identifies a model: its class, and the model_type of transformers or None."""
    model = bare(root)
    kind = getattr(getattr(model, "config", None), "model_type", None)
    return {"class": class_of(root).__name__, "model_type": kind if isinstance(kind, str) else None}


def same_architecture(base: dict[str, Any], model: nn.Module) -> bool:
    """Returns True if a model has the architecture that a file records."""
    here = architecture(model)
    if base["class"] == here["class"]:
        return True
    if base.get("library"):  # peft names the Python module of the class
        return bool(base["library"] == class_of(model).__module__)
    return base.get("model_type") is not None and bool(base["model_type"] == here["model_type"])


def architecture_text(base: dict[str, Any]) -> str:
    """Returns an architecture for messages."""
    kind = base.get("model_type") or base.get("library")
    return f"{base['class']} ({kind})" if kind else str(base["class"])


def owner_of(tensor: str, modules: Collection[str]) -> str | None:
    """Returns the outermost module of a tensor's name that ends in an entry of `modules`, or None.

    As in peft's modules_to_save, the entry may end inside a word.
    """
    parts = tensor.split(".")
    owners = (".".join(parts[:i]) for i in range(1, len(parts)))
    return next((owner for owner in owners if owner.endswith(tuple(modules))), None)


def match(wanted: Collection[str], have: Collection[str]) -> Names:
    """Finds every wanted name: as it is, or without wrappers, or without a `language_model.`
    nesting on either side.

    One rule serves all names: the first that finds all of them, else the one that finds most.
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
        candidates = index.get(rule(name), [])
        if name in candidates or len(candidates) == 1:
            out.found[name] = name if name in candidates else candidates[0]
        else:  # none, or an ambiguous name
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
    """The name within the nested model, for adapters that were saved from it or loaded into it."""
    parts = _unwrapped(name).split(".")
    return ".".join(parts[parts.index(NESTED) + 1 :]) if NESTED in parts else ".".join(parts)
