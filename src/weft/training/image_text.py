"""Vision-language models for `weft train`: the processor of the run."""

from __future__ import annotations

from typing import Any

from ..encoding.processor import Processor, open_processor
from ..errors import ConfigError
from ..tasks.models import ModelRef
from .config.sections import RunConfig


def open_for_images(config: RunConfig, ref: ModelRef, model_config: Any) -> Processor:
    """Returns the processor of the run's model. Raises ConfigError for a key that it has no use
    for, WeftError if the model has none that weft can use.
    """
    if config.model.tokenizer is not None:
        raise ConfigError(
            "model.tokenizer has no meaning for a vision-language model, whose processor has its "
            "tokenizer; leave it out."
        )
    if config.model.new_tokens is not None:
        raise ConfigError(
            "model.new_tokens is not supported for a vision-language model; leave it out."
        )
    return open_processor(ref, model_config)
