"""A small batch with fixed values, for a model of any kind that can be opened by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.tokenizer_files import has_processor, tokenizer_folder
from ..encoding.image_batch import prompt_inputs
from ..encoding.image_files import noise_image
from ..encoding.processor import Processor, reads_images
from ..tasks.models import ModelRef
from .opened import processor_of
from .pretrained import dummy_inputs

SIZE = (48, 40)  # of the picture, width and height


def trial_inputs(
    model: nn.Module, ref: ModelRef, adapter: str | None, tokens: Sequence[int] = ()
) -> dict[str, Tensor]:
    """Returns a batch for the model, as `dummy_inputs`; for a vision-language model with the files
    of its processor beside it or the adapter, one row with a picture and `tokens`. Raises
    ConfigError, or WeftError if the processor cannot be loaded.
    """
    config: Any = getattr(model, "config", None)
    folder = tokenizer_folder(adapter)
    near = [Path(ref.source), *(() if folder is None else (folder,))]
    if config is not None and reads_images(config) and any(map(has_processor, near)):
        processor = processor_of(ref, adapter, config, wanted=True)
        if processor is not None:
            return _with_picture(processor, model, tokens)
    return dummy_inputs(model, tokens)


def _with_picture(
    processor: Processor, model: nn.Module, tokens: Sequence[int]
) -> dict[str, Tensor]:
    picture = noise_image(SIZE)
    text = processor.expansion(SIZE) + "What is in this picture?"
    ids = processor.tokenizer(text)["input_ids"]
    inputs = prompt_inputs(processor, [*ids, *tokens], [picture], torch.device("cpu"))
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
