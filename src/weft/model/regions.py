"""The regions of a forward that torch.utils.checkpoint runs again in backward, and what was active
in each, written on torch's own record of the region.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils import checkpoint

RECORD = "_weft_active"
_UNPACK = "unpack_hook"  # the function of torch.utils.checkpoint that recomputes
_hooks = torch._C._autograd._top_saved_tensors_default_hooks


def note(region: Any, key: int, active: Any) -> None:
    """Writes on a region what is active in it for the model of this key, unless that is written."""
    record = getattr(region, RECORD, None)
    if record is None:
        record = {}
        setattr(region, RECORD, record)
    record.setdefault(key, active)


def innermost() -> Any:
    """Returns the non-reentrant region whose first forward runs now, by torch's hooks for it."""
    hooks = _hooks(True)
    for cell in getattr(hooks[0], "__closure__", None) or ():
        if isinstance(cell.cell_contents, checkpoint._CheckpointFrame):
            return cell.cell_contents
    return None


def around() -> Iterator[Any]:
    """Yields the checkpointed regions around this call, innermost first: those whose first forward
    runs, and those that are recomputed. A region is torch's own record of it: a frame, or the
    reentrant node.
    """
    frame: Any = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_filename == checkpoint.__file__:
            found = _region_of(frame, code)
            if found is not None:
                yield found
        frame = frame.f_back


def _region_of(frame: Any, code: Any) -> Any:
    """The region of one call of torch.utils.checkpoint, or None."""
    if code in _REENTRANT:
        return frame.f_locals.get("ctx")
    if code.co_name == _UNPACK and "frame" in code.co_freevars:
        return frame.f_locals.get("frame")
    if code is _CHECKPOINT:
        generator = frame.f_locals.get("gen")
        inside = getattr(generator, "gi_frame", None)
        return None if inside is None else inside.f_locals.get("new_frame")
    return None


_REENTRANT = (
    checkpoint.CheckpointFunction.forward.__code__,
    checkpoint.CheckpointFunction.backward.__code__,
)
_CHECKPOINT = inspect.unwrap(checkpoint.checkpoint).__code__
