"""Which part of a model is being called, if it is not the model itself: `model.encoder(x)`.

Such a call passes none of the root's hooks, so its first adapted layer does what they do, once for
all layers: the outermost call of a module of the model stands for the whole call.
"""

from __future__ import annotations

import sys
import threading
import weakref
from typing import Any

import torch

from . import cache_marks
from .active import Active, ActiveAdapters, recomputed
from .gate import CALL
from .row_probe import Recorder


class _Held(threading.local):
    """The part that this thread has called last: the frame of the call, which may have ended, and
    what is known of it.
    """

    def __init__(self) -> None:
        self.frame: Any = None
        self.active: ActiveAdapters | None = None
        self.checked: Any = None  # of the choice under which its caches were checked, see `token`
        self.found: tuple[Any, Any, Any] | None = None  # what is known of its rows


_held = _Held()


def active_in(active: ActiveAdapters, training: bool) -> Active:
    """Returns what is active in a layer that runs outside a forward of the root, or in a compiled
    one.
    """
    if torch.compiler.is_compiling():
        return active.current(training)
    active.gate.enter_part()
    found = active.current(training)
    if recomputed() is None and not isinstance(found, Recorder):
        check_caches(active, found)
    return found


def check_caches(active: ActiveAdapters, chosen: Active) -> None:
    """Called by each adapted layer outside a forward of the root. Raises WeftError as
    `cache_marks.check`, which the first layer of a call asks.
    """
    held = of_this_call(active)
    asked = token(chosen)
    if held.checked != asked:
        cache_marks.check_part(active, chosen)
        held.checked = asked


def token(chosen: Active) -> Any:
    """Returns what is equal for equal choices, and keeps none of them alive."""
    return (chosen,) if chosen is None or isinstance(chosen, str) else weakref.ref(chosen)


def of_this_call(active: ActiveAdapters) -> _Held:
    """Returns what is held of the part of this model that is being called, empty for a new call.

    Its `frame` is None if no module's call is on the stack.
    """
    frame: Any = sys._getframe(1)
    last, calls = _held.frame if _held.active is active else None, []
    while frame is not None:
        if frame.f_code is CALL:
            if frame is last:
                return _held
            calls.append(frame)
        frame = frame.f_back
    own = active.modules()
    parts = [call for call in calls if own is None or call.f_locals["self"] in own]
    _held.frame, _held.active = parts[-1] if parts else None, active
    _held.checked = _held.found = None
    return _held
