"""Names in a file and names in a model: the same, or the same but for what known wrappers add."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from difflib import get_close_matches

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_LEADING = ("module", "base_model.model")
_NESTED = "language_model"


@dataclass
class Mapping:
    """File name -> model name of every module that was found, what is missing, and what had to be mapped."""

    names: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    mapped: list[str] = field(default_factory=list)


def canonical(name: str) -> str:
    """A name without the parts that torch.compile, FSDP and activation checkpointing put into it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def match(wanted: Collection[str], have: Collection[str]) -> Mapping:
    """Find every wanted name: as it is, else without wrappers, else without a `language_model.` nesting on either side.

    One rule serves all names; the first under which all are found is taken, else the one that finds most.
    """
    best = Mapping(missing=list(wanted))
    for key in (str, _unwrapped, _flattened):
        found = _by(key, wanted, have)
        if len(found.missing) < len(best.missing) or not wanted:
            best = found
        if not best.missing:
            break
    return best


def nearest(name: str, have: Collection[str]) -> list[str]:
    """Names of the model that the missing one may have meant."""
    return get_close_matches(name, [h for h in have if h], n=2, cutoff=0.4)


def _by(key: Callable[[str], str], wanted: Collection[str], have: Collection[str]) -> Mapping:
    index: dict[str, list[str]] = {}
    for name in have:
        index.setdefault(key(name), []).append(name)
    out = Mapping()
    for name in wanted:
        places = index.get(key(name), [])
        if name in places:
            places = [name]
        if len(places) != 1:  # none, or more than one that it could be
            out.missing.append(name)
            continue
        out.names[name] = places[0]
    changed = {_change(a, b) for a, b in out.names.items() if a != b}
    out.mapped = sorted(changed)
    return out


def _change(a: str, b: str) -> str:
    """What differs between two names, with the part they share at the end left out."""
    left, right = a.split("."), b.split(".")
    while left and right and left[-1] == right[-1]:
        left.pop()
        right.pop()
    return f"{'.'.join([*left, '*'])} in the file is {'.'.join([*right, '*'])} in the model"


def _unwrapped(name: str) -> str:
    bare = canonical(name)
    while True:
        prefix = next((p for p in _LEADING if bare.startswith(p + ".")), None)
        if prefix is None:
            return bare
        bare = bare[len(prefix) + 1 :]


def _flattened(name: str) -> str:
    return ".".join(part for part in _unwrapped(name).split(".") if part != _NESTED)
