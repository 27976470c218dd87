"""From `targets=` to the layers of a model, and to the layers that stay frozen and the reasons."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from ... import methods
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
        held_back = _held_back(structure, config, fields)
        names = (
            _in_role(structure, pattern, held_back, without)
            if pattern in ROLES
            else _matching(structure, pattern, {**left_out, **held_back})
        )
        if not names and not (pattern == "all-linear" and "conv" in also):
            raise _no_match(structure, pattern, {**left_out, **held_back})
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
    taken = {**_held_back(structure, config, {}), **taken}
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


def _stored(site: base_layers.Site) -> Any:
    """The parameter that holds the weight of a layer; None if none does."""
    holder, tensor = base_layers.holder(site)
    return holder._parameters.get(tensor)


def _convolutions(structure: Structure) -> dict[str, base_layers.Site]:
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
    the chosen layers that get tokens which a router has regrouped: experts with modules of their
    own.
    """
    left_out = _left_out(structure)
    frozen = []
    for name, module in structure.layers.items():
        if name not in chosen:
            reason = left_out.get(name, "not named by targets")
            frozen.append(Frozen(name, _kind(module), _weight_shape(module, name), reason))
    frozen += [raw for raw in _raw_tensors(structure) if raw.name not in chosen]
    routed = [n for n in chosen if within(n, structure.experts) and not is_stack(structure, n)]
    return frozen, routed


def _in_role(
    structure: Structure, role: str, held_back: Mapping[str, str], without: list[Frozen]
) -> list[str]:
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
    faults = {
        name: base_layers.why_not(structure.carriers[name]) or held_back.get(name) for name in names
    }
    usable = [name for name in names if faults[name] is None]
    for name, why in faults.items():
        weight = _stored(structure.carriers[name])
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
    """Whether a layer is a parameter of a module that has several: fused experts."""
    if name in structure.held:
        return False
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
        names = names or _held(structure, pattern)
        for name in names:
            why = base_layers.why_not(structure.carriers[name])
            if why is not None:
                cls = type(base_layers.holder(structure.carriers[name])[0]).__name__
                raise TargetError(
                    f"targets: {pattern!r} names {name!r} ({cls}), which cannot be adapted: {why}."
                )
        return names
    for among in (layers, structure.held):
        found = [
            name
            for name, site in among.items()
            if any(matches("targets", pattern, n) for n in called(name))
            and base_layers.why_not(site) is None
        ]
        if found:
            return found
    return []


def _held(structure: Structure, ending: str) -> list[str]:
    """The weights with this ending that modules read themselves; or, if it is the ending of such
    modules, all of theirs.
    """
    held = structure.held
    found = [name for name in held if any(ends_in(n, ending) for n in called(name))]
    if found:
        return found
    hosts = {
        id(structure.modules[name])
        for name in structure.modules
        if name and any(ends_in(n, ending) for n in called(name))
    }
    return [name for name, site in held.items() if id(site.host) in hosts]


def _held_back(structure: Structure, config: LayerConfig, fields: Any) -> dict[str, str]:
    """The weights that attention reads itself and a method cannot adapt, with the reasons: a
    keyword leaves them out.
    """
    method = methods.replace(config, dict(fields))
    found = {}
    for name, site in structure.held.items():
        why = base_layers.held_fault(site, method) if site.is_linear_map else None
        if why is not None:
            found[name] = why
    return found


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
        if prefix in structure.layers or isinstance(module, ParametrizationList):
            continue
        for tensor, p in module._parameters.items():
            if f"{prefix}.{tensor}".lstrip(".") in structure.layers:
                continue
            if p is None or p.ndim < 2 or min(p.shape[-2:]) < 2:
                continue
            name, shape = f"{prefix}.{tensor}".lstrip("."), tuple(p.shape)
            if name in structure.layers:
                continue
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
                if name in structure.held and base_layers.why_not(structure.held[name]) is None:
                    reason += "; adapted if targets name it"
                yield Frozen(name, "tensor", shape, reason)


def _weight_shape(site: base_layers.Site, name: str) -> tuple[int, ...]:
    """(out, in) if the layer has a weight matrix; the parameter's own shape if it is a stack."""
    module, tensor = base_layers.holder(site, name)
    kind = base_layers.kind_of(module)
    if kind is not None and kind.tensors_of(module):
        own = module._parameters.get(tensor)
        return () if own is None else tuple(own.shape)
    packing = packing_of(module)
    if packing is not None:
        return packing.shape(module)
    weight = module._parameters.get(tensor)
    if weight is None:
        return ()
    shape = tuple(weight.shape)
    return shape[::-1] if kind is not None and kind.transposed else shape


def _kind(module: base_layers.Site) -> str:
    """The name of the kind, for the plan."""
    kind = base_layers.kind_of(module)
    return "layer" if kind is None else kind.kind
