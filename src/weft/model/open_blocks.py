"""The open `with weft.use(...)` blocks of one model, and how the replacement of an adapter waits
for them.

A block sees one adapter from its beginning to its end. So a replacement waits until no block uses
the adapter, and blocks that would begin to use it meanwhile wait for the replacement.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ..errors import WeftError
from .gate import PATIENCE

Names = Sequence[str | None]


class OpenBlocks:
    """Counts by adapter (None: the base) and thread. A copy or a pickle starts without blocks."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._counts: Counter[tuple[str | None, int]] = Counter()
        self._closing: set[str] = set()  # adapters that are being replaced

    def __reduce__(self) -> Any:
        return OpenBlocks, ()

    def of(self, name: str | None) -> int:
        """Returns the number of open blocks that use this adapter, of all threads."""
        with self._changed:
            return self._of(name)

    def all(self) -> int:
        """Returns the number of uses by all open blocks."""
        with self._changed:
            return self._counts.total()

    def enter(self, names: Names, nested: bool) -> None:
        """Begins a block. Waits while one of the adapters is being replaced, unless the caller is
        inside a block or a forward (`nested`), or its thread is: the replacement may be waiting for
        just that.

        Raises WeftError if that takes a minute.
        """
        me = threading.get_ident()
        with self._changed:
            busy = nested or any(
                count for (_, thread), count in self._counts.items() if thread == me
            )
            if not busy:
                self._wait(lambda: self._closing.isdisjoint(names), "begin `with weft.use(...)`")
            self._counts.update((name, me) for name in names)

    def leave(self, names: Names) -> None:
        """Ends a block that began in this thread, or in another (a generator that moved)."""
        me = threading.get_ident()
        with self._changed:
            for name in names:
                owners = [t for (n, t), count in self._counts.items() if n == name and count > 0]
                self._counts[name, me if me in owners or not owners else owners[0]] -= 1
            self._counts = +self._counts
            self._changed.notify_all()

    @contextmanager
    def closed(self, name: str) -> Iterator[None]:
        """Keeps new blocks of an adapter waiting.

        Raises WeftError if another replacement of it takes a minute.
        """
        with self._changed:
            self._wait(lambda: name not in self._closing, f"replace adapter {name!r}")
            self._closing.add(name)
        try:
            yield
        finally:
            with self._changed:
                self._closing.discard(name)
                self._changed.notify_all()

    def wait_until_unused(self, name: str) -> None:
        """Waits until no block uses the adapter.

        Raises WeftError if a block of this very thread does, which could never end meanwhile, or if
        it takes a minute.
        """
        me = threading.get_ident()
        with self._changed:
            if self._counts[name, me] > 0:
                raise WeftError(
                    f"adapter {name!r} is used by an open `with weft.use(...)` of this thread. Leave the "
                    "block before you replace the adapter."
                )
            self._wait(lambda: not self._of(name), f"replace adapter {name!r}")

    def _of(self, name: str | None) -> int:
        return sum(count for (known, _), count in self._counts.items() if known == name)

    def _wait(self, condition: Any, what: str) -> None:
        until = time.monotonic() + PATIENCE
        while not condition():
            if not self._changed.wait(max(0.0, until - time.monotonic())) and not condition():
                raise WeftError(
                    f"cannot {what}: open `with weft.use(...)` blocks of other threads have kept the "
                    f"adapter for {PATIENCE:.0f} s. End them first."
                )
