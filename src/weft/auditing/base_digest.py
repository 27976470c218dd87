"""Digests of the bits of the base model."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from hashlib import sha256

import torch
from torch import Tensor, nn

from ..model.attach import adapters
from ..model.packings import parts
from ..model.state import base_only, find_state, unwrapped


def base_digests(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Returns digests of every tensor that is not an adapter's: parameters (pretrained values) and
    persistent buffers.
    """
    state = find_state(model)
    root = unwrapped(model) if state is None else state.root
    with base_only(state), torch.no_grad():
        tensors = root.state_dict(keep_vars=True)
        ours = {id(p) for a in adapters(model).values() for p in a.parameters()}
        ours |= adapter_buffers(model)
        return {
            key: digest(t)
            for key, t in tensors.items()
            if isinstance(t, Tensor) and id(t) not in ours
        }


def base_fingerprint(digests: Mapping[str, tuple[int, int]], missing: Collection[str]) -> str:
    """Returns 16 hex digits over the digests of the pretrained tensors. `missing` are the names of
    tensors that were in no checkpoint.
    """
    pretrained = sorted((name, value) for name, value in digests.items() if name not in missing)
    return sha256(repr(pretrained).encode()).hexdigest()[:16]


def adapter_buffers(model: nn.Module) -> set[int]:
    """Returns the ids of the adapters' buffers, which are in the state_dict and not of the base."""
    return {
        id(b)
        for adapter in adapters(model).values()
        for site in adapter.layers.values()
        for b in site.buffers()
    }


def digest(t: Tensor) -> tuple[int, int]:
    """Returns two wrapping sums over the bits of t [...]. They change if any one element changes or
    any two elements are exchanged.
    """
    plain = parts(t)
    if len(plain) > 1:
        found = [digest(p) for p in plain]
        return sum(a for a, _ in found), sum((i + 1) * b for i, (_, b) in enumerate(found))
    t = plain[0]
    if t.numel() == 0 or t.is_meta:
        return (0, t.numel())
    flat = t.detach().contiguous().reshape(-1)
    whole = flat.numel() * flat.element_size() // 8 * 8
    raw = flat.view(torch.uint8)
    words = (
        raw[:whole].view(torch.int64)
        if raw.storage_offset() % 8 == 0
        else raw[:whole].clone().view(torch.int64)
    )
    tail = raw[whole:].to(torch.int64)
    weight = torch.arange(words.numel(), device=t.device, dtype=torch.int64) * 2 + 1
    return int(words.sum() + tail.sum()), int(
        (words * weight).sum() + (tail * torch.arange(1, tail.numel() + 1, device=t.device)).sum()
    )
