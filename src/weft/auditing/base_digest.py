"""Digests of the bits of the base model."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from hashlib import sha256

import torch
from torch import Tensor, nn

from ..model.attach import adapters
from ..model.packings import parts
from ..model.saving import MERGED
from ..model.state import base_only, find_state, unwrapped
from ..ops.digest import digest as bits_of


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
            if isinstance(t, Tensor) and id(t) not in ours and not key.startswith(MERGED)
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
    """Returns the digest of a tensor [...], or of all tensors that a quantised one consists of."""
    plain = parts(t)
    if len(plain) == 1:
        return bits_of(plain[0])
    found = [bits_of(p) for p in plain]
    return sum(a for a, _ in found), sum((i + 1) * b for i, (_, b) in enumerate(found))
