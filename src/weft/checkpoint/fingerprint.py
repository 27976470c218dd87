"""The fingerprint of a base model: a few numbers of its frozen weights, which travel with an
adapter.

An adapter's update means something only on the weights that it was trained on, and another model of
the same architecture has the same names and shapes. same_base.py compares the numbers at load.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..model import base_layers
from ..model.adapter import Adapter
from ..model.carried import CHILD
from ..model.offload import stored
from ..model.packed_merge import originals
from ..model.state import base_only, find_state
from ..model.structure import canonical

TENSORS = 48  # of the base that are sampled: all matrices of a small model
_NUMBERS = 192  # in all, but at least 4 and at most 32 per tensor
_RUN = 128  # consecutive numbers whose distinct values are counted
_FEW = 0.8  # share of distinct ones; of bfloat16 0.9, of 8 bits 0.6, of 4 bits 0.2
_PLAIN = (Tensor, nn.Parameter)


class Sampled(NamedTuple):
    """One tensor of the base, as W [out, in] if it belongs to a linear map, and how many numbers of
    it.
    """

    name: str
    shape: tuple[int, ...]
    numbers: int


@dataclass(frozen=True)
class Fingerprint:
    """`values` [numbers] are those of all tensors, one after the other, in bfloat16; NaN for a
    tensor that could not be read. `few`: whether some of the weights take few distinct values.
    """

    sampled: tuple[Sampled, ...]
    values: Tensor
    few: bool = False

    def manifest(self) -> list[Any]:
        """Returns the tensors as plain JSON values."""
        return [[s.name, list(s.shape), s.numbers] for s in self.sampled]

    def text(self) -> str:
        """Returns the values as text, whose length depends on the tensors alone, with a
        checksum.
        """
        raw = bytes(self.values.to(torch.bfloat16).view(torch.uint8).tolist())
        body = base64.b64encode(raw + bytes([self.few])).decode()
        return body + _seal(body)

    @classmethod
    def parse(cls, manifest: Sequence[Any], text: str) -> Fingerprint:
        """Reads what `manifest` and `text` returned. Raises ValueError if it is damaged."""
        sampled = tuple(Sampled(n, tuple(map(int, shape)), int(c)) for n, shape, c in manifest)
        for entry, s in zip(manifest, sampled, strict=True):
            sizes = (s.numbers, *s.shape)
            named = isinstance(entry[0], str)
            if not named or not s.shape or not 0 < min(sizes) <= max(sizes) < 2**31:
                raise ValueError(f"the fingerprint of the base has an entry {entry!r}")
        body, seal = text[:-16], text[-16:]
        if seal != _seal(body):
            raise ValueError("the fingerprint of the base is not the one that was saved")
        raw = base64.b64decode(body)
        values = torch.frombuffer(bytearray(raw[:-1]), dtype=torch.bfloat16)
        if values.numel() != sum(s.numbers for s in sampled):
            raise ValueError("the fingerprint of the base has another length")
        return cls(sampled, values, bool(raw[-1]))


@torch.no_grad()
def fingerprint_of(adapter: Adapter, values: bool = True) -> Fingerprint | None:
    """Samples the base tensors that the adapter leaves frozen; None if there are none.

    Tables with rows of new tokens are left out: in the base these rows are whatever they were drawn
    as. With values=False no tensor is read.
    """
    root, state = adapter.model, find_state(adapter.model)
    tables = {id(layer.base.module.weight) for layer in adapter.token_layers.values()}
    with base_only(state):
        tensors = {
            name: t
            for name, t in base_tensors(root).items()
            if id(t) not in tables
            and all(t is not s.original for s in adapter.selected_tensors.values())
        }
        names = _spread([n for n, t in tensors.items() if t.ndim > 1], TENSORS)
        names += _spread([n for n, t in tensors.items() if t.ndim == 1], TENSORS - len(names))
        if not names:
            return None
        count = max(4, min(32, _NUMBERS // len(names)))
        views = {canonical(name): oriented(root, name, tensors[name]) for name in names}
        sampled = tuple(Sampled(name, tuple(t.shape), count) for name, t in views.items())
        if not values:
            nothing = torch.full((len(sampled) * count,), torch.nan, dtype=torch.bfloat16)
            return Fingerprint(sampled, nothing)
        now = before_merge(root, views)
        found = torch.cat([numbers_of(now[s.name], s) for s in sampled])
        return Fingerprint(sampled, found.to(torch.bfloat16), any_few(list(now.values())))


def base_tensors(root: nn.Module) -> dict[str, Tensor]:
    """Returns the floating-point parameters [...] of the base by name, a tied one once; those of
    packed layers that an adapter is merged into as they were before.
    """
    state = find_state(root)
    merged = None if state is None else state.merged
    packed = {} if merged is None else originals(merged)
    tensors = ((name, packed.get(id(p), p)) for name, p in root.named_parameters())
    return {
        name: p
        for name, p in tensors
        if p is not None and p.is_floating_point() and p.numel() and CHILD not in name.split(".")
    }


def oriented(root: nn.Module, name: str, t: Tensor) -> Tensor:
    """The tensor as W [out, in], if a linear map stores it the other way round."""
    parent, _, tensor = name.rpartition(".")
    module = root.get_submodule(parent)
    kind = base_layers.kind_of(module)
    kept = stored(module, tensor) if t.is_meta else None  # offloaded by accelerate
    t = t if kept is None else kept
    turned = kind is not None and kind.transposed and not kind.takes_ids and tensor == "weight"
    return t.t() if turned and t.ndim == 2 else t


def before_merge(root: nn.Module, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors [...] with the bits from before a merge."""
    state = find_state(root)
    merged = state.merged.backups if state is not None and state.merged is not None else []
    bits = {b.parameter.data_ptr(): b.bits for b in merged}
    return {
        name: t if (own := bits.get(t.data_ptr())) is None else own.as_strided(t.shape, t.stride())
        for name, t in views.items()
    }


def numbers_of(t: Tensor, s: Sampled) -> Tensor:
    """Returns the numbers [count] at the places of `s`, on the CPU; NaN where `t` has none to
    read.
    """
    nothing = torch.full((s.numbers,), torch.nan)
    if t.is_meta or type(t) not in _PLAIN or t.ndim != len(s.shape) or t.shape[1:] != s.shape[1:]:
        return nothing
    index = torch.arange(1, s.numbers + 1)
    places = [_place(index, step, size) for step, size in zip(_STEPS, s.shape, strict=False)]
    inside = places[0] < t.shape[0]  # an embedding may have been resized
    where = tuple(p[inside].to(t.device) for p in places)
    bits = t.detach() if t.element_size() > 1 else t.detach().view(torch.uint8)  # float8
    found = bits[where].reshape(int(inside.sum()), -1)[:, 0].view(t.dtype)
    nothing[inside] = found.float().cpu()
    return nothing


# Multiples of these, modulo 2**32, are spread evenly; the first is 2**32 times the golden section.
_STEPS = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F, 0x165667B1)


def _place(index: Tensor, step: int, size: int) -> Tensor:
    return (index * step % 2**32 * size) >> 32


def any_few(tensors: Sequence[Tensor]) -> bool:
    """Whether one of the weights [out, in] takes few distinct values."""
    matrices = [t for t in tensors if t.ndim > 1 and not t.is_meta and type(t) in _PLAIN]
    return any(few_values(matrices[i]) for i in _indices(len(matrices), 8))


def few_values(W: Tensor) -> bool:
    """Whether weights W [out, ...] were quantised: few distinct values among neighbours, or all of
    a row multiples of 1/127 of its largest, but for a rounding to bfloat16.
    """
    W = W.detach().flatten(1)
    start = W.numel() // 2 // _RUN * _RUN
    flat = W.reshape(-1)[start : start + _RUN].float().cpu()
    for run in (W[len(W) // 2][:_RUN].float().cpu(), flat):
        numbers = run[run != 0]
        if len(numbers) >= 8 and len(torch.unique(numbers)) <= _FEW * len(numbers):
            return len(torch.unique(numbers.abs())) > 1  # else a constant
    rows = W[torch.tensor(_indices(len(W), 16), device=W.device)].float().cpu()
    steps = rows * 127 / rows.abs().amax(1, keepdim=True)
    whole = (steps - steps.round()).abs() <= steps.abs() / 128 + 0.02
    return rows.numel() >= 32 and len(torch.unique(steps.abs().round())) > 2 and bool(whole.all())


def _spread(names: list[str], most: int) -> list[str]:
    """At most so many of the names, evenly spread, with the first and the last."""
    return [names[i] for i in _indices(len(names), most)]


def _indices(size: int, most: int) -> list[int]:
    if size <= most:
        return list(range(size))
    return [round(i * (size - 1) / (most - 1)) for i in range(most)] if most > 1 else [0][:most]


def _seal(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()[:16]
