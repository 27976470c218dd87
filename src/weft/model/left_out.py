"""The share of a base's weights that an adapter leaves out, by the kind of layer that holds them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import nn

from ..errors import TargetError
from ..methods.config import LayerConfig
from ..methods.target_spec import patterns
from . import base_layers
from .packings import packing_of
from .plan_entries import Frozen
from .structure import Structure, base_modules, base_parameters
from .structure.names import within
from .structure.targets import STACK

EVERY = "all-linear"
NOTED = (
    0.1  # the least share that "all-linear" says that it leaves out, in layers that it cannot adapt
)
NEARLY_ALL, NEARLY_NOTHING = 0.9, 0.01  # left out and adapted: then "all-linear" is an error
# The kinds that targets can name, and how: for the message; and the words that name them.
NAMED: dict[str, str] = {
    "convolution": 'Write targets=["all-linear", "conv"] to adapt them too, or exclude="conv" to say that '
    "they stay frozen",
    "experts": 'targets="experts" adapts the experts',
}
WORDS: dict[str, str] = {"convolution": "conv", "experts": "experts"}


@dataclass(frozen=True)
class Share:
    """The weights of one kind that no adapter is on: their number, and whether the plan's reason is
    that "all-linear" cannot adapt them.
    """

    kind: str
    numbers: int
    unable: bool


def count(root: nn.Module) -> int:
    """Returns the number of the base's weights: a packed weight [out, in] counts out · in."""
    return sum(_numbers(root).values())


def _numbers(root: nn.Module) -> dict[int, int]:
    """Every parameter's size, or that of what it is packed from, by its identity; tied ones once."""
    found: dict[int, int] = {}
    for _, module in base_modules(root):
        packing = packing_of(module)
        own: list[Any] = list(module._parameters.values())
        if packing is not None:
            found[_key(module, "weight")] = prod(packing.shape(module))
            own = [getattr(module, "bias", None)]
        for p in own:
            if isinstance(p, nn.Parameter):
                found.setdefault(id(p), p.numel())
    return found


def _vectors(root: nn.Module) -> int:
    """The number of the base's biases and gains, which no plan lists."""
    return sum(p.numel() for _, p in base_parameters(root) if p.ndim < 2)


def _key(module: nn.Module, tensor: str) -> int:
    """The identity of a weight: of its parameter, or of the module that has it packed otherwise."""
    held: Any = module._parameters.get(tensor)
    return id(held) if held is not None else id(module)


def shares(root: nn.Module, frozen: Sequence[Frozen]) -> list[Share]:
    """Returns the weights of the layers that a plan lists as frozen, by kind, the largest first."""
    sizes, modules = _numbers(root), dict(base_modules(root))
    seen: set[int] = set()
    found: dict[tuple[str, bool], int] = {}
    for entry in frozen:
        parent, _, tensor = entry.name.rpartition(".")
        layer, tensor = (entry.name, "weight") if entry.name in modules else (parent, tensor)
        key = _key(modules[layer], tensor) if layer in modules else 0
        if key not in sizes or key in seen:
            continue
        seen.add(key)
        label = (_kind(entry), _unable(entry, modules[layer]))
        found[label] = found.get(label, 0) + sizes[key]
    ordered = sorted(found.items(), key=lambda item: -item[1])
    return [Share(kind, numbers, unable) for (kind, unable), numbers in ordered]


def _kind(entry: Frozen) -> str:
    if entry.kind in ("linear", "conv1d", "tensor", "layer"):
        return entry.reason.partition(",")[0].partition(";")[0]
    return entry.kind


def _unable(entry: Frozen, module: nn.Module) -> bool:
    if entry.reason == STACK:
        return True
    if entry.kind in ("router", "embedding") or entry.reason == "output head":
        return False
    if entry.kind in NAMED:
        return True
    return base_layers.kind_of(module) is None or base_layers.why_not(module) is not None


def text(found: Sequence[Share], total: int) -> str:
    """Returns for example "experts 94.1 %, embedding 2.3 %"; what is below 0.1 % is not named."""
    named: dict[str, int] = {}
    for share in found:
        named[share.kind] = named.get(share.kind, 0) + share.numbers
    parts = [f"{k} {100 * n / total:.3g} %" for k, n in named.items() if n >= total / 1000]
    return ", ".join(parts)


def check(structure: Structure, config: Any, frozen: Sequence[Frozen]) -> list[str]:
    """Returns what "all-linear" leaves out because it is of another kind, in one sentence, if it is
    much of the model. Raises TargetError if next to nothing is left to adapt.
    """
    if not isinstance(config, LayerConfig):
        return []
    named = [pattern for pattern, _ in patterns(config.targets)]
    if EVERY not in named:
        return []
    every, total = shares(structure.root, frozen), count(structure.root)
    left = [
        share for share in every if share.unable and WORDS.get(share.kind) not in config.exclude
    ]
    without = sum(share.numbers for share in left)
    if without < NOTED * total:
        return []
    cures = [NAMED[s.kind] for s in left if s.kind in NAMED]
    message = (
        f"targets={EVERY!r} leaves out {100 * without / total:.3g} % of the "
        f"{type(structure.root).__name__}'s weights, which are in no linear layer that Weft can adapt: "
        f"{text(left, total)}"
    )
    rest = total - sum(share.numbers for share in every) - _vectors(structure.root)
    if without >= NEARLY_ALL * total and rest < NEARLY_NOTHING * total:
        raise TargetError(
            f"{message}. So there is next to nothing to adapt. "
            f"{' or '.join(cures) or 'Name the layers that you want to adapt in targets'}."
        )
    return [f"{message}. {'; '.join(cures) or 'adapter.plan() lists them'}."]


def unread(structure: Structure, frozen: Sequence[Frozen]) -> list[str]:
    """Returns one sentence on what the configuration names and stays frozen since no output depends
    on it, if there is such a thing.
    """
    named = {entry.name for entry in frozen if entry.unread}
    places = [
        f"{module} ({why})"
        for module, why in structure.unread.items()
        if any(within(name, [module]) for name in named)
    ]
    if not places:
        return []
    more = f" and {len(places) - 3} more" if len(places) > 3 else ""
    return [f"No output depends on {'; '.join(places[:3])}{more}, so nothing there is trained."]
