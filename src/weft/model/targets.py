"""From `targets=` to the layers of a model, and to what stays frozen and why."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any

from torch import nn

from ..errors import TargetError
from ..methods.target_spec import KEYWORDS, ROLES, is_ending, patterns
from . import base_layers, roles, structure
from .plan import Frozen


@dataclass(frozen=True)
class Found:
    """`sites`: module name -> overridden fields; `routed`: those of them that see tokens regrouped
    by a router.
    """

    sites: Mapping[str, Mapping[str, Any]]
    frozen: list[Frozen] = field(default_factory=list)
    routed: list[str] = field(default_factory=list)


def resolve(root: nn.Module, targets: Any, skip_layers: int = 0) -> Found:
    """Match a checked `targets` against a model. Every pattern must match something; a layer that
    is compiled or wrapped by FSDP or activation checkpointing is called as if it were not.

    skip_layers: the blocks of every stack, counted from its input, that are left out. Raises
    TargetError: a pattern that matches nothing (with the nearest names), or a layer named by its
    ending that cannot be adapted (with the reason).
    """
    layers = {
        name: module for name, module in structure.base_modules(root) if base_layers.has_map(module)
    }
    left_out = _left_out(root, layers)
    sites: dict[str, dict[str, Any]] = {}
    without: list[Frozen] = []
    for pattern, fields in patterns(targets):
        names = (
            _in_role(root, pattern, without)
            if pattern in ROLES
            else _matching(root, pattern, layers, left_out)
        )
        if not names:
            raise _no_match(root, pattern, layers, left_out)
        for name in names:
            sites[name] = {**sites.get(name, {}), **fields}
    skipped = _skipped(root, sites, skip_layers)
    ordered = {
        name: sites[name]
        for name, _ in structure.base_modules(root)
        if name in sites and name not in skipped
    }
    frozen, routed = leftovers(root, ordered)
    frozen = [
        replace(f, reason=f"left out by skip_layers={skip_layers}") if f.name in skipped else f
        for f in frozen
    ]
    return Found(ordered, [*frozen, *without], routed)


def _in_role(root: nn.Module, role: str, without: list[Frozen]) -> list[str]:
    """One module a block (an attention output each attention); blocks that have none are added to
    `without`.
    """
    found = roles.blocks(root)
    lacking = [block for block in found if not block.of(role)]
    if lacking and len(lacking) == len(found):
        other = "" if role == "attention-output" else ', for example "attention-output"'
        raise TargetError(
            f"targets={role!r} finds no layer: {lacking[0].name!r} has none, since "
            f"{lacking[0].why_not(role)}. Name other layers{other}."
        )
    without += [
        Frozen(block.name, "block", (block.width,), f"no {role}: {block.why_not(role)}")
        for block in lacking
    ]
    names = [name for block in found for name in block.of(role)]
    for name in names:
        why = base_layers.why_not(root.get_submodule(name))
        if why is not None:
            raise TargetError(f"targets={role!r} means {name!r}, which cannot be adapted: {why}.")
    return names


def _skipped(root: nn.Module, sites: Collection[str], skip_layers: int) -> set[str]:
    """The sites that lie in the lowest blocks."""
    if not skip_layers:
        return set()
    blocks = roles.blocks(root)
    low = [block.name for block in blocks if block.index < skip_layers]
    skipped = {name for name in sites if structure.within(name, low)}
    if len(skipped) == len(sites) or not blocks:
        raise TargetError(
            f"skip_layers={skip_layers} leaves nothing to adapt: the model has "
            f"{max((block.index + 1 for block in blocks), default=0)} blocks. Skip fewer."
        )
    return skipped


def leftovers(root: nn.Module, chosen: Collection[str]) -> tuple[list[Frozen], list[str]]:
    """What could have been adapted and was not, with the reason; and which of the chosen are routed
    experts.
    """
    layers = {
        name: module for name, module in structure.base_modules(root) if base_layers.has_map(module)
    }
    left_out = _left_out(root, layers)
    frozen = []
    for name, module in layers.items():
        if name not in chosen:
            reason = left_out.get(name, "not named by targets")
            frozen.append(Frozen(name, _kind(module), _shape(module), reason))
    frozen += _raw_tensors(root, layers)
    experts = list(structure.expert_modules(root))
    return frozen, [name for name in chosen if structure.within(name, experts)]


def _left_out(root: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Layers that "all-linear" leaves out, and why."""
    heads = structure.head_modules(root)
    routers = structure.router_modules(root, structure.expert_modules(root))
    out = {}
    for name, module in layers.items():
        why = base_layers.why_not(module)
        if why is not None:
            out[name] = why
        elif structure.within(name, heads):
            out[name] = "output head"
        elif isinstance(module, nn.Embedding):
            out[name] = "embedding"
        elif name in routers:
            out[name] = "router of a mixture of experts"
    return out


def _matching(
    root: nn.Module, pattern: str, layers: Mapping[str, nn.Module], left_out: Mapping[str, str]
) -> list[str]:
    if pattern in KEYWORDS:
        kinds = structure.attention_or_mlp(root) if pattern != "all-linear" else {}
        return [
            name
            for name in layers
            if name not in left_out and pattern in ("all-linear", kinds.get(name))
        ]
    if is_ending(pattern):
        names = [
            name
            for name in layers
            if any(n == pattern or n.endswith("." + pattern) for n in _called(name))
        ]
        for name in names:
            why = base_layers.why_not(layers[name])
            if why is not None:
                raise TargetError(
                    f"targets: {pattern!r} names {name!r} ({type(layers[name]).__name__}), which "
                    "cannot be "
                    f"adapted: {why}."
                )
        return names
    return [
        name
        for name, module in layers.items()
        if any(re.fullmatch(pattern, n) for n in _called(name))
        and base_layers.why_not(module) is None
    ]


def _called(name: str) -> tuple[str, str]:
    """A layer's name as it is, and without the parts that wrappers put into it."""
    return name, structure.canonical(name)


def _no_match(
    root: nn.Module, pattern: str, layers: Mapping[str, nn.Module], left_out: Mapping[str, str]
) -> TargetError:
    usable = [name for name, module in layers.items() if base_layers.why_not(module) is None]
    have = sorted({structure.canonical(name).rpartition(".")[2] for name in usable})
    if pattern in KEYWORDS:
        reasons = (
            ", ".join(
                sorted({f"{name.rpartition('.')[2]}: {why}" for name, why in left_out.items()})
            )
            or "none"
        )
        return TargetError(
            f"targets={pattern!r} finds no layer in this model. It leaves out: {reasons}. Name "
            "what you "
            f"want to adapt; the model's linear layers end in: {have}."
        )
    for raw in _raw_tensors(root, layers):
        if is_ending(pattern) and f".{raw.name}".endswith(f".{pattern}"):
            return TargetError(
                f"targets: {pattern!r} names {raw.name!r} {list(raw.shape)}, which is no linear "
                "layer: "
                f"{raw.reason}."
            )
    near = get_close_matches(pattern.rpartition(".")[2], have, n=3) or have[:8]
    return TargetError(
        f"targets: {pattern!r} matches none of the model's {len(usable)} linear layers"
        f"{'' if is_ending(pattern) else ' (as a regular expression over the whole name)'}. "
        f"Nearest endings: {near}. `weft plan --model MODEL` lists all layers."
    )


def _raw_tensors(root: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[Frozen]:
    """Weights that no linear layer owns: fused experts, routers, convolutions, raw matrices."""
    experts = structure.expert_modules(root)
    routers = structure.router_modules(root, experts)
    for prefix, module in structure.base_modules(root):
        if prefix in layers:
            continue
        for tensor, p in module._parameters.items():
            if p is None or p.ndim < 2 or min(p.shape[-2:]) < 2:
                continue
            name = f"{prefix}.{tensor}".lstrip(".")
            if structure.within(prefix, list(experts)) and p.ndim == 3:
                yield Frozen(
                    name,
                    "experts",
                    tuple(p.shape),
                    f"{p.shape[0]} experts fused into one three-dimensional "
                    "tensor, which Weft does not adapt",
                )
            elif prefix in routers:
                yield Frozen(name, "router", tuple(p.shape), "router of a mixture of experts")
            elif isinstance(module, nn.modules.conv._ConvNd):
                yield Frozen(
                    name, "convolution", tuple(p.shape), "a convolution; Weft adapts linear maps"
                )
            else:
                yield Frozen(
                    name,
                    "tensor",
                    tuple(p.shape),
                    f"read by {type(module).__name__} itself, not by a linear layer",
                )


def _shape(module: nn.Module) -> tuple[int, ...]:
    """(out, in) where the layer has a weight matrix."""
    weight = module._parameters.get("weight")
    if weight is None:
        return ()
    shape = tuple(weight.shape)
    kind = base_layers.kind_of(module)
    return shape[::-1] if kind is not None and kind.transposed else shape


def _kind(module: nn.Module) -> str:
    kind = base_layers.kind_of(module)
    return "layer" if kind is None else kind.kind
