"""Checks of a run before it begins, so that no time is lost on one that would fail later."""

from __future__ import annotations

import importlib.util

from torch import nn

from ..errors import ConfigError
from ..inference.generate import check_fits
from ..tasks.quantize import check_package
from .config.sections import REPORTERS, RunConfig
from .losses import METRICS
from .prepare import Data


def check_packages(config: RunConfig) -> None:
    """Raises ConfigError, with the install command, if a package that the run needs is missing."""
    if config.model.quantize is not None:
        check_package(config.model.quantize)
    for name in config.log.report_to:
        if importlib.util.find_spec(REPORTERS[name]) is None:
            raise ConfigError(
                f"log.report_to: {name} needs the package {REPORTERS[name]}: pip install "
                f"{REPORTERS[name]}"
            )


def check_best(config: RunConfig, data: Data) -> None:
    """Raises ConfigError if eval.best is not a metric of this data."""
    best = config.eval.best
    if best is None:
        return
    if data.eval is None:
        raise ConfigError(f"eval.best={best!r}: there is no evaluation data.")
    known = METRICS[data.kind]
    if data.task is not None and config.eval.records != 0:
        known = (*known, data.task.main_metric)
    if best not in known:
        raise ConfigError(f"eval.best={best!r}: the metrics of {data.kind} are {', '.join(known)}.")


def check_prompts_fit(config: RunConfig, data: Data, model: nn.Module) -> None:
    """Raises WeftError if a prompt to answer at evaluations exceeds the model's positions."""
    if data.task is None or data.renderer is None or data.eval is None or config.eval.records == 0:
        return
    records = data.task.eval_records("validation")[: config.eval.records]
    coded = [data.renderer.prompt_ids(record["prompt"]) for record in records]
    check_fits(model, coded, data.task.generation)
