"""From `targets=` to the layers of a model, and to the layers that stay frozen and the reasons."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any

from torch import nn

from ...errors import TargetError
from ...methods.config import LayerConfig
from ...methods.target_spec import KEYWORDS, ROLES, is_ending, patterns
from .. import base_layers
from ..packings import packing_of
from ..plan_entries import Frozen
from .names import called, canonical, ends_in, matches, within
from .picks import taken_away
from .structure import Structure

_CONVOLUTION = 'a convolution, which targets="conv" names'
STACK = 'fused experts, which only targets="experts" or their names choose'


@dataclass(frozen=True)
class Found:
    """`layers`: module name -> overridden fields. `routed`: those of them that see tokens regrouped
    by a router.
    """

    layers: Mapping[str, Mapping[str, Any]]
    frozen: list[Frozen] = field(default_factory=list)
    routed: list[str] = field(default_factory=list)


def resolve(structure: Structure, config: LayerConfig) -> Found:
    """Matches the checked `targets` of a configuration against a model, and takes away what
    `within`, `layers` and `exclude` leave out. Every name must match something; the names that
    compiling, FSDP and activation checkpointing add are ignored.

    Raises TargetError if a pattern matches nothing (with the nearest names), if a layer named by
    its ending cannot be adapted (with the reason), or if no output depends on what a pattern names.
    """
    left_out = _left_out(structure)
    fields_of: dict[str, dict[str, Any]] = {}
    without: list[Frozen] = []
    unread: set[str] = set()
    also = [pattern for pattern, _ in patterns(config.targets)]
    for pattern, fields in patterns(config.targets):
        names = (
            _in_role(structure, pattern, without)
            if pattern in ROLES
            else _matching(structure, pattern, left_out)
        )
        if not names and not (pattern == "all-linear" and "conv" in also):
            raise _no_match(structure, pattern, left_out)
        for name in _read(structure, pattern, names):
            fields_of[name] = {**fields_of.get(name, {}), **fields}
        meant = left_out if pattern == "all-linear" else names
        unread |= {
            name
            for name in meant
            if (why := structure.why_unread(name)) is not None and left_out.get(name, why) == why
        }
    taken = taken_away(structure, config, fields_of)
    ordered = {
        name: fields_of[name]
        for name in structure.carriers
        if name in fields_of and name not in taken
    }
    frozen, routed = leftovers(structure, ordered)
    unread -= taken_away(structure, config, [*fields_of, *unread]).keys()
    frozen = [
        replace(f, reason=taken.get(f.name, f.reason), unread=f.name in unread) for f in frozen
    ]
    return Found(ordered, [*frozen, *without], routed)


def _read(structure: Structure, pattern: str, names: list[str]) -> list[str]:
    """The layers that can change an output. Raises TargetError if a pattern names none of them."""
    found = [name for name in names if structure.why_unread(name) is None]
    if names and not found:
        raise TargetError(
            f"targets: {pattern!r} names {names[0]!r}, which changes no output: it is "
            f"{structure.why_unread(names[0])}. Name other layers."
        )
    return found


def _convolutions(structure: Structure) -> dict[str, nn.Module]:
    """The convolutions that can be adapted, outside the output head."""
    return {
        name: module
        for name, module in structure.layers.items()
        if base_layers.is_convolution(module)
        and base_layers.why_not(module) is None
        and not within(name, structure.head)
    }


def leftovers(structure: Structure, chosen: Collection[str]) -> tuple[list[Frozen], list[str]]:
    """Returns the layers that could have been adapted but were not, with the reason, and those of
    the chosen layers that get tokens which a router has regrouped: experts with modules of their own.
    """
    left_out = _left_out(structure)
    frozen = []
    for name, module in structure.layers.items():
        if name not in chosen:
            reason = left_out.get(name, "not named by targets")
            frozen.append(Frozen(name, _kind(module), _weight_shape(module, name), reason))
    frozen += _raw_tensors(structure)
    routed = [n for n in chosen if within(n, structure.experts) and not is_stack(structure, n)]
    return frozen, routed


def _in_role(structure: Structure, role: str, without: list[Frozen]) -> list[str]:
    """One module per block (an attention output per attention); blocks that have none are added to
    `without`.
    """
    lacking = [block for block in structure.blocks if not block.of(role)]
    if lacking and len(lacking) == len(structure.blocks):
        other = "" if role == "attention-output" else ', for example "attention-output"'
        raise TargetError(
            f"targets={role!r} finds no layer: {lacking[0].name!r} has none, since "
            f"{lacking[0].why_not(role)}. Name other layers{other}."
        )
    without += [
        Frozen(block.name, "block", (block.width,), f"no {role}: {block.why_not(role)}")
        for block in lacking
    ]
    names = [name for block in structure.blocks for name in block.of(role)]
    faults = {name: base_layers.why_not(structure.root.get_submodule(name)) for name in names}
    usable = [name for name in names if faults[name] is None]
    for name, why in faults.items():
        weight = structure.modules[name]._parameters.get("weight")
        frozen = weight is not None and base_layers.dtype_fault(weight) is not None
        if why is not None and not (frozen and usable):  # a quantised weight stays frozen, by name
            raise TargetError(f"targets={role!r} means {name!r}, which cannot be adapted: {why}.")
    return usable


def _left_out(structure: Structure) -> dict[str, str]:
    """The layers that "all-linear" leaves out, with the reasons."""
    out = {}
    for name, module in structure.layers.items():
        why = base_layers.why_not(module)
        if why is not None:
            out[name] = why
        elif (unread := structure.why_unread(name)) is not None:
            out[name] = unread
        elif within(name, structure.head):
            out[name] = "output head"
        elif isinstance(module, nn.Embedding):
            out[name] = "embedding"
        elif name in structure.routers:
            out[name] = "router of a mixture of experts"
        elif base_layers.is_convolution(module):
            out[name] = _CONVOLUTION
        elif is_stack(structure, name):
            out[name] = STACK
    return out


def is_stack(structure: Structure, name: str) -> bool:
    """Whether a layer is a parameter of a module: fused experts."""
    return name in structure.layers and name not in structure.modules


def _matching(structure: Structure, pattern: str, left_out: Mapping[str, str]) -> list[str]:
    layers = structure.layers
    if pattern == "experts":
        return _experts(structure)
    if pattern in KEYWORDS:
        return [
            name
            for name in layers
            if left_out.get(name) in (None, _CONVOLUTION)
            and (structure.is_part(name, pattern) or _is_called(name, pattern))
        ]
    if is_ending(pattern):
        names = [name for name in layers if any(ends_in(n, pattern) for n in called(name))]
        for name in names:
            why = base_layers.why_not(layers[name])
            if why is not None:
                raise TargetError(
                    f"targets: {pattern!r} names {name!r} ({type(layers[name]).__name__}), which "
                    f"cannot be adapted: {why}."
                )
        return names
    return [
        name
        for name, module in layers.items()
        if any(matches("targets", pattern, n) for n in called(name))
        and base_layers.why_not(module) is None
    ]


def _experts(structure: Structure) -> list[str]:
    """Every weight of a routed expert, fused or in a layer of its own. Raises TargetError if one of
    them cannot be adapted.
    """
    names = [n for n in structure.layers if within(n, structure.experts)]
    faults = {n: why for n in names if (why := base_layers.why_not(structure.layers[n]))}
    raw = {f.name: f.reason for f in _raw_tensors(structure) if f.kind == "experts"}
    for name, why in {**faults, **raw}.items():
        raise TargetError(f"targets='experts' means {name!r}, which cannot be adapted: {why}.")
    return names


def _is_called(name: str, pattern: str) -> bool:
    """Whether a layer has the name "conv", which is a keyword too."""
    return pattern == "conv" and any(ends_in(each, pattern) for each in called(name))


def _no_match(structure: Structure, pattern: str, left_out: Mapping[str, str]) -> TargetError:
    usable = [
        name for name, module in structure.layers.items() if base_layers.why_not(module) is None
    ]
    have = sorted({canonical(name).rpartition(".")[2] for name in usable})
    if pattern in KEYWORDS:
        reasons = (
            ", ".join(
                sorted({f"{name.rpartition('.')[2]}: {why}" for name, why in left_out.items()})
            )
            or "none"
        )
        cure = "Name what you want to adapt"
        if pattern != "conv" and (convolutions := _convolutions(structure)):
            cure = f'targets="conv" adapts its {len(convolutions)} convolutions. Or name layers'
        return TargetError(
            f"targets={pattern!r} finds no layer in this model. It leaves out: {reasons}. {cure}; the "
            f"model's layers end in: {have}."
        )
    for raw in _raw_tensors(structure):
        if is_ending(pattern) and f".{raw.name}".endswith(f".{pattern}"):
            return TargetError(
                f"targets: {pattern!r} names {raw.name!r} {list(raw.shape)}, which is no linear "
                f"layer: {raw.reason}."
            )
    near = get_close_matches(pattern.rpartition(".")[2], have, n=3) or have[:8]
    what = "layers" if _convolutions(structure) else "linear layers"
    return TargetError(
        f"targets: {pattern!r} matches none of the model's {len(usable)} {what}"
        f"{'' if is_ending(pattern) else ' (as a regular expression over the whole name)'}. "
        f"Nearest endings: {near}. `weft plan --model MODEL` lists all layers."
    )


def _raw_tensors(structure: Structure) -> Iterator[Frozen]:
    """Weights outside the layers that Weft knows: fused experts, routers, raw matrices."""
    for prefix, module in structure.modules.items():
        if prefix in structure.layers:
            continue
        for tensor, p in module._parameters.items():
            if f"{prefix}.{tensor}".lstrip(".") in structure.layers:
                continue
            if p is None or p.ndim < 2 or min(p.shape[-2:]) < 2:
                continue
            name, shape = f"{prefix}.{tensor}".lstrip("."), tuple(p.shape)
            if within(prefix, structure.experts) and p.ndim == 3:
                reason = (
                    f"{p.shape[0]} experts fused into one tensor that {type(module).__name__} reads "
                    "by a forward of its own, which Weft does not know"
                )
                yield Frozen(name, "experts", shape, reason)
            elif prefix in structure.routers:
                yield Frozen(name, "router", shape, "router of a mixture of experts")
            else:
                reason = f"read by {type(module).__name__} itself, not by a linear layer"
                yield Frozen(name, "tensor", shape, reason)


def _weight_shape(module: nn.Module, name: str) -> tuple[int, ...]:
    """(out, in) if the layer has a weight matrix; the parameter's own shape if it is a stack."""
    kind = base_layers.kind_of(module)
    if kind is not None and kind.tensors_of(module):
        own = module._parameters.get(name.rpartition(".")[2])
        return () if own is None else tuple(own.shape)
    packing = packing_of(module)
    if packing is not None:
        return packing.shape(module)
    weight = module._parameters.get("weight")
    if weight is None:
        return ()
    shape = tuple(weight.shape)
    return shape[::-1] if kind is not None and kind.transposed else shape


def _kind(module: nn.Module) -> str:
    """The name of the kind, for the plan."""
    kind = base_layers.kind_of(module)
    return "layer" if kind is None else kind.kind
