"""Checksums of tensors that a file does not store, because a seed decides them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cache
from typing import Any

from torch import Tensor

from ..methods.projections import Projections
from ..model.adapter import Adapter
from . import files

FIXED = "fixed"  # the key of the checksum over the layers' own frozen tensors
UNKNOWN = "0" * 16  # in place of a checksum if only the size of the file is wanted


def shared_key(rule: Any) -> str:
    """Returns the share key of a rule as text."""
    return "/".join(map(str, rule.share_key() or ()))


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
        site.get_buffer(name) for site in adapter.sites.values() for name in site.fixed_names
    )


def digest_of(tensors: Iterable[Tensor]) -> str | None:
    """Returns 16 hex digits over the checksums of tensors [...]; None without any."""
    sums = "".join(map(files.checksum, tensors))
    return hashlib.sha256(sums.encode()).hexdigest()[:16] if sums else None


def checksums_of(adapter: Adapter, values: bool = True) -> dict[str, str]:
    """Returns the checksums that a header records, by share key; zeros with values=False."""
    found = {
        shared_key(site.rule): shared_checksum(site.shared) if values else UNKNOWN
        for site in adapter.sites.values()
        if isinstance(site.shared, Projections)
    }
    if any(site.fixed_names for site in adapter.sites.values()):
        found[FIXED] = (fixed_checksum(adapter) if values else None) or UNKNOWN
    return found
