"""The lines of a plan: trained and frozen tensors."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One adapted layer or trained base tensor; `shape` is [out, in] for a layer."""

    name: str
    kind: str
    shape: tuple[int, ...]
    trainable: int
    nbytes: int


@dataclass(frozen=True)
class Frozen:
    """A layer or tensor that could have been adapted and was not. `unread`: the configuration names
    it, and no output depends on it.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    reason: str
    unread: bool = False
