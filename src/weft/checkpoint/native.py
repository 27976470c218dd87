"""Weft's own layout, for what `peft` has no form for.

All layers' tensors of one name, shape and dtype are stacked: "b.768.float32" [layers, 768]. A
tensor of its own for each would spend about a hundred bytes of header on it, which for VeRA's
vectors is a fair part of the file. Base tensors that were trained as copies keep their own names.
The order of the layers is the manifest's.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from ..model.adapter import Adapter
from ..model.structure import canonical
from .content import Stored, report_extra, take
from .header import trained_tensors

_SELECTED = "base/"


def write(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors by key, and the base tensors trained as copies by name."""
    groups: dict[str, list[Tensor]] = {}
    for site in adapter.layers.values():
        for tensor, value in trained_tensors(site).items():
            groups.setdefault(_key(tensor, tuple(value.shape), str(value.dtype)), []).append(value)
    selected = {canonical(name): p.detach() for name, p in adapter.selected.items()}
    stacked = {key: torch.stack(parts) for key, parts in groups.items()}
    return {**stacked, **{_SELECTED + name: t for name, t in selected.items()}}, selected


def read(stored: Stored, tensors: dict[str, Tensor], selected: Collection[str]) -> None:
    """Fill `stored.sites` (which the manifest named) and `stored.selected`; `tensors` is
    emptied.
    """
    groups: dict[str, list[tuple[str, str]]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for module, site in stored.sites.items():
        for tensor, shape in site.rule.shapes(*(site.shape or (0, 0))).items():
            key = _key(tensor, shape, site.rule.dtype)
            groups.setdefault(key, []).append((module, tensor))
            shapes[key] = shape
    for key, members in groups.items():
        what = f"{members[0][1]} of {len(members)} layers, the first {members[0][0]!r}"
        found = take(tensors, key, (len(members), *shapes[key]), what, stored.problems)
        for place, (module, tensor) in enumerate(members):
            stored.sites[module].keys[tensor] = key
            if found is not None:
                stored.sites[module].tensors[tensor] = found[place]
    take_selected(stored, tensors, _SELECTED, selected)
    report_extra(stored, tensors, [*groups, *(_SELECTED + name for name in selected)])


def take_selected(
    stored: Stored, tensors: dict[str, Tensor], prefix: str, names: Collection[str]
) -> None:
    """Base tensors trained as copies, under `prefix` + name. Full keeps integer tensors too; the
    model tells which.
    """
    for name in names:
        if prefix + name in tensors and not tensors[prefix + name].is_floating_point():
            stored.selected[name] = tensors.pop(prefix + name)
            continue
        found = take(
            tensors, prefix + name, None, "a base tensor trained as a copy", stored.problems
        )
        if found is not None:
            stored.selected[name] = found


def _key(tensor: str, shape: tuple[int, ...], dtype: str) -> str:
    return f"{tensor}.{'x'.join(map(str, shape))}.{dtype.removeprefix('torch.')}"
