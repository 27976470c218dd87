"""Weft's own layout, for what `peft` has no form for.

All layers' tensors of one name, shape and dtype are stacked: "b.768.float32" [layers, 768]. A tensor of its own for
each would spend about a hundred bytes of header on it, which for VeRA's vectors is a fair part of the file. Base
tensors that were trained as copies keep their own names. The order of the layers is the manifest's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..model.adapter import Adapter
from .content import Stored, extra, take

SELECTED = "base/"


def write(adapter: Adapter) -> dict[str, Tensor]:
    """Tensors by key."""
    groups: dict[str, list[Tensor]] = {}
    for site in adapter.sites.values():
        for tensor, parameter in site.trainable().items():
            groups.setdefault(_key(tensor, tuple(parameter.shape), parameter.dtype), []).append(parameter.detach())
    stacked = {key: torch.stack(parts) for key, parts in groups.items()}
    return {**stacked, **{SELECTED + name: p.detach() for name, p in adapter.selected.items()}}


def read(stored: Stored, manifest: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
    """Fill `stored.sites` (which the manifest named) and `stored.selected`; `tensors` is emptied."""
    groups: dict[str, list[tuple[str, str]]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for module, site in stored.sites.items():
        for tensor, shape in site.rule.trained(*(site.shape or (0, 0))).items():
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
    read_selected(stored, manifest["selected"], SELECTED, tensors)
    stored.problems += extra(tensors, [*groups, *(SELECTED + name for name in manifest["selected"])])


def read_selected(stored: Stored, names: list[str], prefix: str, tensors: dict[str, Tensor]) -> None:
    """Base tensors trained as copies, under `prefix` + name."""
    for name in names:
        key = prefix + name
        if key in tensors and not tensors[key].is_floating_point():  # Full keeps integer tensors too
            stored.selected[name] = tensors.pop(key)
            continue
        found = take(tensors, key, None, "a base tensor trained as a copy", stored.problems)
        if found is not None:
            stored.selected[name] = found


def _key(tensor: str, shape: tuple[int, ...], dtype: Any) -> str:
    return f"{tensor}.{'x'.join(map(str, shape))}.{str(dtype).removeprefix('torch.')}"


