"""Checksums of tensors that a file does not store, because a seed decides them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cache
from typing import Any

from torch import Tensor

from ..errors import CheckpointError
from ..methods.projections import Projections
from ..model.adapter import Adapter
from . import files

MOST_DRAWN = 2**28  # numbers: 1 GiB in float32; rank 1024 for layers 100,000 wide needs 2**28
FIXED = "fixed"  # the key of the checksum over the layers' own frozen tensors
UNKNOWN = "0" * 16  # in place of a checksum if only the size of the file is wanted


def check_drawn(rule: Any, out: int, in_: int, stack: int = 1) -> None:
    """Raises CheckpointError if the tensors that a seed decides, for `stack` layers [out, in] of
    which only a file says that they exist, are larger than any model's.
    """
    r = getattr(rule, "r", 1)
    if stack * r * (out + in_) > MOST_DRAWN:
        raise CheckpointError(
            f"a layer [{out}, {in_}] with r={r}, as the file claims, needs {stack * r * (out + in_):,} "
            f"numbers that are drawn from its seed; at most {MOST_DRAWN:,} are drawn for layers "
            "that no model confirms."
        )


def shared_key(method: Any) -> str:
    """Returns the share key of a method as text."""
    return "/".join(map(str, method.share_key() or ()))


def shared_checksum(shared: Projections) -> str:
    """Returns the checksum of A [r, in] and B [out, r], cached if a seed decides them."""
    if shared.draw == "stored":
        return shared.checksum()
    return _drawn_checksum(shared.r, shared.max_in, shared.max_out, shared.seed, shared.draw)


@cache
def _drawn_checksum(r: int, max_in: int, max_out: int, seed: int, draw: str) -> str:
    return Projections(r, max_in, max_out, seed, draw).checksum()


def fixed_checksum(adapter: Adapter) -> str | None:
    """Returns one checksum over the frozen tensors of the layers, as in memory; None without any."""
    return digest_of(
        layer.get_buffer(name) for layer in adapter.layers.values() for name in layer.frozen_names
    )


def digest_of(tensors: Iterable[Tensor]) -> str | None:
    """Returns 16 hex digits over the checksums of tensors [...]; None without any."""
    sums = "".join(map(files.checksum, tensors))
    return hashlib.sha256(sums.encode()).hexdigest()[:16] if sums else None


def checksums_of(adapter: Adapter, values: bool = True) -> dict[str, str]:
    """Returns the checksums that a header records, by share key; zeros with values=False."""
    found = {
        shared_key(layer.method): shared_checksum(layer.shared) if values else UNKNOWN
        for layer in adapter.layers.values()
        if isinstance(layer.shared, Projections)
    }
    if any(layer.frozen_names for layer in adapter.layers.values()):
        found[FIXED] = (fixed_checksum(adapter) if values else None) or UNKNOWN
    return found
