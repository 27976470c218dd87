"""Lets forwards of a model run side by side, and changes of the model only between them.

A forward enters through a hook on the root. A change (attach, load, detach, merge) waits until no
other thread is inside; forwards that come meanwhile wait for the change. Adapters that train base
tensors replace them by copies, and a model has one set at a time: forwards that need another set
wait for those that run.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import WeftError

PATIENCE = 60.0  # seconds that a caller waits for the others before it is an error


class Gate:
    """One model's gate. A copy or a pickle starts open."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside: dict[int, int] = {}  # thread -> forwards that it is inside of
        self._changing: int | None = None  # the thread that changes the model
        self._depth = 0

    def __reduce__(self) -> Any:
        return Gate, ()

    def enter(self, ready: Callable[[], bool], prepare: Callable[[], None]) -> None:
        """Called before a forward. If not `ready()`, waits to be alone and calls `prepare()`.

        Raises WeftError if other threads keep the model busy for a minute.
        """
        me = threading.get_ident()
        with self._changed:
            if not self._free(me, ready):
                self._wait(lambda: self._free(me, ready), "run a forward")
            if not ready():
                if not self._alone(me):
                    raise WeftError(
                        "a forward within a forward needs other base tensors, while other threads "
                        "run this model. Run them one after the other."
                    )
                prepare()
            self._inside[me] = self._inside.get(me, 0) + 1

    def leave(self) -> None:
        """Called after a forward."""
        me = threading.get_ident()
        with self._changed:
            depth = self._inside.get(me, 0) - 1
            if depth > 0:
                self._inside[me] = depth
            else:
                self._inside.pop(me, None)
                self._changed.notify_all()

    @contextmanager
    def alone(self, what: str) -> Iterator[None]:
        """Waits until no other thread is inside, and keeps others out. Raises WeftError as `enter`."""
        me = threading.get_ident()
        with self._changed:
            self._wait(lambda: self._changing in (None, me) and self._alone(me), what)
            self._changing, self._depth = me, self._depth + 1
        try:
            yield
        finally:
            with self._changed:
                self._depth -= 1
                if not self._depth:
                    self._changing = None
                    self._changed.notify_all()

    @property
    def closed_to_me(self) -> bool:
        """Whether another thread is changing the model."""
        return self._changing is not None and self._changing != threading.get_ident()

    def wait_until_open(self) -> None:
        """Waits for a change by another thread. Raises WeftError as `enter`."""
        with self._changed:
            self._wait(lambda: not self.closed_to_me, "run a layer")

    def _alone(self, me: int) -> bool:
        return all(thread == me for thread in self._inside)

    def _free(self, me: int, ready: Callable[[], bool]) -> bool:
        if me in self._inside or self._changing == me:
            return True
        return self._changing is None and (ready() or self._alone(me))

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        if not self._changed.wait_for(condition, PATIENCE):
            raise WeftError(
                f"cannot {what}: other threads have kept this model busy for {PATIENCE:.0f} s. End "
                "their forward first."
            )
