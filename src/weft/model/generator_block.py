"""A `with weft.use(...)` block in a generator.

A generator has no context of its own: what it chooses stays with its consumer when it yields, and
what the consumer chooses stays with it when it goes on. So each such block is an object that knows
the generator's frame. Within the generator its own choice holds, whatever the consumer has chosen
and in whatever thread it goes on; while it is paused its choice is nobody's.

A generator that contextlib or pytest runs as a context manager is meant to choose for its caller.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import sys
import types
import weakref
from typing import Any

_GENERATOR = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR
_MANAGERS = (contextlib.__file__, "_pytest/fixtures.py", "_pytest\\fixtures.py")


class Block:
    """The open blocks of one generator on one model. `choice` is what it has chosen, and `before`
    what its caller had; `frame` is None once they are closed.
    """

    def __init__(self, frame: Any, before: Any) -> None:
        self.frame, self.before = frame, before
        self.choice: Any = before
        self.depth = 0
        code = frame.f_code
        self.where = f"{code.co_name} (line {frame.f_lineno} of {code.co_filename})"
        self._generator: Any = None  # weak, as it ends when nobody refers to it

    @property
    def is_closed(self) -> bool:
        """Whether the generator has left all its blocks."""
        return self.frame is None

    def runs(self) -> bool:
        """Whether the generator runs or awaits now, in whatever thread or task."""
        if self._generator is None and self.frame is not None:
            found = next((g for g in gc.get_objects() if _frame_of(g) is self.frame), None)
            self._generator = None if found is None else weakref.ref(found)
        found = None if self._generator is None else self._generator()
        return bool(getattr(found, "gi_running", False) or getattr(found, "ag_running", False))

    def close(self) -> None:
        """Forgets the frame, with all that its variables hold."""
        self.frame = self._generator = None


class Blocks(dict[Any, Block]):
    """The open blocks of one model, by the frame of their generator."""

    def innermost(self) -> Block | None:
        """Returns the block of the innermost generator that runs on this thread's stack."""
        frame: Any = sys._getframe(1)
        while frame is not None:
            if frame in self:
                return self[frame]
            frame = frame.f_back
        return None


def generator_frame() -> Any:
    """Returns the frame of the generator that enters a `with weft.use(...)`, if it is one. Called
    by `__enter__`.
    """
    frame: Any = sys._getframe(2)
    while (manager := _manager_of(frame)) is not None:
        frame = manager.f_back
    return frame if frame is not None and frame.f_code.co_flags & _GENERATOR else None


def _manager_of(frame: Any) -> Any:
    """The frame of contextlib or pytest that this frame is, or that runs this generator."""
    while frame is not None:
        if frame.f_code.co_filename.endswith(_MANAGERS):
            return frame
        if not frame.f_code.co_flags & _GENERATOR:
            return None
        frame = frame.f_back  # another generator, which yields what this one does
    return None


def _frame_of(found: Any) -> Any:
    if isinstance(found, types.GeneratorType):
        return found.gi_frame
    return found.ag_frame if isinstance(found, types.AsyncGeneratorType) else None
