"""Which evaluation is the best one, and whether a run has reached its end."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .config.sections import EvalSection, RunConfig
from .losses import LOWER_IS_BETTER


def scores(
    history: Sequence[Mapping[str, Any]], section: EvalSection, prefix: str = "eval_"
) -> list[float]:
    """Returns the metric eval.best of every evaluation, with its sign such that more is better.

    -inf means no value (a correlation with predictions that are all equal). Every evaluation has a
    loss.
    """
    sign = -1.0 if section.best in LOWER_IS_BETTER else 1.0
    values = [entry.get(f"{prefix}{section.best}") for entry in history if f"{prefix}loss" in entry]
    return [-math.inf if value is None or math.isnan(value) else sign * value for value in values]


def best_index(values: list[float]) -> int:
    """Returns the index of the first of the best."""
    return max(range(len(values)), key=values.__getitem__)


def stale(values: list[float], min_delta: float) -> int:
    """Returns the number of evaluations since the last one that exceeded the best before it by more
    than min_delta.
    """
    best, since = -math.inf, 0
    for value in values:
        best, since = (value, 0) if value > best + min_delta else (best, since + 1)
    return since


def has_ended(checkpoint: Path, config: RunConfig, steps: int) -> bool:
    """Whether training ended with this checkpoint, by its steps or by eval.patience, so that only
    the result is missing.
    """
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    section = config.eval
    stopped = (
        section.patience is not None
        and stale(scores(state["log_history"], section), section.min_delta) >= section.patience
    )
    return bool(state["global_step"] >= steps or stopped)
