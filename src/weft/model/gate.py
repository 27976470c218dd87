"""Lets forwards of a model run side by side, and changes of the model only between them.

A forward enters through a hook on the root. A change (attach, load, detach, merge) waits until no
other thread is inside; forwards that come meanwhile wait for the change. Adapters that train base
tensors replace them by copies, and a model has one set at a time: forwards that need another set
wait for those that run.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..errors import WeftError
from ..ops.input_cache import runs

PATIENCE = 60.0  # seconds that a caller waits for the others before it is an error


class Gate:
    """One model's gate. A copy or a pickle starts open."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        # Thread -> the calls of the model that it is inside of, as frames. A call that an interrupt has
        # ended, or that a part of the model has entered, stays until somebody looks whether it runs.
        self._inside: dict[int, list[Any]] = {}
        self._changing: int | None = None  # the thread that changes the model
        self._wanted = 0  # threads that wait to change it; new forwards wait for them
        self._depth = 0

    def __reduce__(self) -> Any:
        return Gate, ()

    def enter(self, call: Any, ready: Callable[[], bool], prepare: Callable[[], None]) -> None:
        """Called before a forward, with the frame of its call. If not `ready()`, waits to be alone
        and calls `prepare()`.

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
            self._inside.setdefault(me, []).append(call)

    def leave(self, call: Any) -> None:
        """Called after a forward, as `enter`; does nothing if that call did not enter."""
        me = threading.get_ident()
        with self._changed:
            calls = self._inside.get(me, [])
            place = next((i for i, c in enumerate(calls) if c is call), None)
            if place is None:
                return
            del calls[place:]
            if not calls:
                del self._inside[me]
                self._changed.notify_all()

    def is_inside(self) -> bool:
        """Whether this thread is within a forward, or changes the model."""
        me = threading.get_ident()
        with self._changed:
            return self._changing == me or any(map(runs, self._inside.get(me, ())))

    def enter_part(self) -> None:
        """Called by an adapted layer that runs outside a forward of the root: the outermost module
        that is being called passes the gate. Raises WeftError as `enter`.
        """
        me, frame, call = threading.get_ident(), _frame_above(), None
        entered = self._inside.get(me, ())
        while frame is not None:
            if frame.f_code is CALL:
                if any(frame is c for c in entered):
                    return
                call = frame
            frame = frame.f_back
        with self._changed:
            self._inside.pop(me, None)  # a part that has ended
            if not self._open(me):
                self._wait(lambda: self._open(me), "run a layer")
            if call is not None:
                self._inside[me] = [call]

    @contextmanager
    def alone(self, what: str) -> Iterator[None]:
        """Waits until no other thread is inside, and keeps others out. Raises WeftError as `enter`."""
        me = threading.get_ident()
        with self._changed:
            self._wanted += 1
            try:
                self._wait(lambda: self._changing in (None, me) and self._alone(me), what)
            finally:
                self._wanted -= 1
                self._changed.notify_all()
            self._changing, self._depth = me, self._depth + 1
        try:
            yield
        finally:
            with self._changed:
                self._depth -= 1
                if not self._depth:
                    self._changing = None
                    self._changed.notify_all()

    def _alone(self, me: int) -> bool:
        for thread in [t for t in self._inside if t != me]:
            if not any(map(runs, self._inside[thread])):
                del self._inside[thread]
        return all(thread == me for thread in self._inside)

    def _open(self, me: int) -> bool:
        return self._changing == me or (self._changing is None and not self._wanted)

    def _free(self, me: int, ready: Callable[[], bool]) -> bool:
        if self._changing == me or (me in self._inside and any(map(runs, self._inside[me]))):
            return True
        return self._open(me) and (ready() or self._alone(me))

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        """Looks again and again: a part of the model leaves without a sign."""
        until = time.monotonic() + PATIENCE
        while not condition():
            if time.monotonic() > until:
                raise WeftError(
                    f"cannot {what}: other threads have kept this model busy for {PATIENCE:.0f} s. "
                    "End their forward first."
                )
            self._changed.wait(0.005)


def _frame_above() -> Any:
    return sys._getframe(2)


def this_call() -> Any:
    """Returns the innermost call of a module on this thread's stack, as its frame."""
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_code is not CALL:
        frame = frame.f_back
    return frame


def calls(kind: Any = None) -> Iterator[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]:
    """Yields the calls of modules on this thread's stack, innermost first, as (module, args,
    kwargs).

    `kind`: the code that is looked for, CALL by default.
    """
    frame: Any = sys._getframe(1)
    while frame is not None:
        if frame.f_code is (kind or CALL):
            given = frame.f_locals
            yield given["self"], given["args"], given["kwargs"]
        frame = frame.f_back


CALL = nn.Module._call_impl.__code__
COMPILED_CALL = nn.Module._wrapped_call_impl.__code__  # also of a call that is being compiled
