"""Notices that the tensors of an adapter were changed in place: an optimiser step, an edit."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor


class Versions:
    """`changes`: how often the tensors were found changed. What writes through `.data` or a pointer
    is not counted by torch, and not seen.
    """

    def __init__(self, tensors: Iterable[Tensor], changes: int = 0) -> None:
        found: Any = [t for t in tensors if not t.is_inference()]
        self._refs = [weakref.ref(t) for t in found]
        self._seen = [t._version for t in found]
        self.changes = changes

    def count(self) -> int:
        """Returns `changes`, after a look at all tensors."""
        now = [
            last if (t := ref()) is None else t._version
            for ref, last in zip(self._refs, self._seen, strict=True)
        ]
        if now != self._seen:
            self._seen, self.changes = now, self.changes + 1
        return self.changes
