"""Opens a task for one model. Another kind of task is a file beside `labelled`, `generated` and
`seen`, and a line here.
"""

from __future__ import annotations

from collections.abc import Mapping

from ...tasks import ShapesRef, TaskRef, find_any
from ...tasks.models import ModelRef
from .base import OpenTask
from .generated import open_generated
from .labelled import open_labelled
from .seen import open_seen


def open_task(
    name: str, test: str | None, model: ModelRef, limits: Mapping[str, int | None]
) -> OpenTask:
    """Reads the data and loads the model in float32. limits: the largest number of examples of a
    split, by its name.

    Raises ConfigError if there is no such task, WeftError if the data or the model cannot be used
    or do not fit together.
    """
    ref = find_any(name, test)
    if isinstance(ref, TaskRef):
        return open_labelled(ref, model, limits)
    if isinstance(ref, ShapesRef):
        return open_seen(ref, model, limits)
    return open_generated(ref, model, limits)
