"""A model with its adapter, on its device, with its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ..checkpoint.load import load, read
from ..checkpoint.tokenizer_files import (
    RUN_TOKENIZER,
    has_processor,
    lone_template,
    tokenizer_folder,
)
from ..encoding.image_render import ImageRenderer
from ..encoding.processor import Processor, open_processor, reads_images
from ..encoding.render import Renderer
from ..encoding.tokenizer import max_tokens, tokenizer_and_stops
from ..errors import ConfigError, WeftError
from ..tasks.models import ModelRef, loading, quiet
from ..tasks.quantize import check_package
from ..tasks.vocabulary import padding, use_padding
from .pretrained import base_for, find_source, is_classifier


@dataclass(frozen=True)
class Opened:
    """A model in eval mode with its adapter active, if it has one, and its tokenizer. `limit` is
    the number of tokens that both accept, `notes` what loading the adapter noted. `processor` is
    that of a vision-language model, if images were asked for or the adapter was trained with it.
    """

    model: Any
    tokenizer: Any
    renderer: Renderer
    limit: int
    notes: list[str] = field(default_factory=list)
    processor: Processor | None = None


def open_model(
    model: str,
    adapter: str | None,
    dtype: str = "auto",
    device: str = "auto",
    template: str | None = None,
    other_base: bool = False,
    quantize: str | None = None,
    images: bool = False,
) -> Opened:
    """Loads the model with this name, and the adapter if there is one; with other_base on whatever
    weights the model has. `quantize`: a name of `tasks.quantize.QUANTIZE`. The tokenizer with its
    chat template is the adapter's if that has one, else the model's; `template` replaces the
    template.

    With `images` it must be a vision-language model. Raises ConfigError if one of them does not
    exist, WeftError if they do not fit together.
    """
    ref = find_source(model)
    own = _tokenizer_of(ref, adapter)
    with quiet(), loading(own, "a tokenizer and a configuration"):
        tokenizer, config, stops = tokenizer_and_stops(ref, own)
    processor = processor_of(ref, adapter, config, images)
    tokenizer = tokenizer if processor is None else processor.tokenizer
    note = None if template else missing_tokenizer(adapter)
    template = template or lone_template(adapter)
    loaded, notes = load_model(ref, adapter, dtype, device, other_base, quantize)
    notes += [note] if note is not None and _generates(loaded) else []
    limit = max_tokens(tokenizer, config, loaded)
    if is_classifier(loaded):
        use_padding(loaded.config, padding(tokenizer, loaded.config)[0])
    renderer = (
        Renderer(tokenizer, limit, template=template, stops=stops)
        if processor is None
        else ImageRenderer(processor, limit, template=template, stops=stops)
    )
    return Opened(loaded, tokenizer, renderer, limit, notes, processor)


def processor_of(
    ref: ModelRef, adapter: str | None, config: Any, wanted: bool = False
) -> Processor | None:
    """Returns the processor of a vision-language model, which is the adapter's if that has one;
    None if none is `wanted` and the adapter was trained without one. Raises ConfigError, WeftError.
    """
    folder = tokenizer_folder(adapter)
    trained = folder is not None and has_processor(folder)
    if not wanted and not (trained and reads_images(config)):
        return None
    return open_processor(ref, config, _tokenizer_of(ref, adapter) if trained else None)


def missing_tokenizer(adapter: str | None) -> str | None:
    """Returns what an adapter that was saved or copied without its run has lost, as a note, or
    None.
    """
    if adapter is None or tokenizer_folder(adapter) is not None or lone_template(adapter):
        return None
    return (
        "the adapter comes without a tokenizer, so the base's is used, with its chat template. If "
        "the run had others (data.chat_template, model.tokenizer), the prompts are not those of "
        f"training: copy the files of the run's {RUN_TOKENIZER}/ beside the adapter"
    )


def _tokenizer_of(ref: ModelRef, adapter: str | None) -> ModelRef:
    """The adapter's tokenizer, if it has one, else the model's."""
    folder = tokenizer_folder(adapter)
    return ref if folder is None else ModelRef(f"{folder} (the adapter's)", str(folder), True)


def set_padding(model: Any, ref: ModelRef, adapter: str) -> None:
    """Writes the pad token of training, which is the tokenizer's, into the configuration of a
    classifier, which finds the end of a text by it. Raises WeftError if neither has one.
    """
    own = _tokenizer_of(ref, adapter)
    try:
        with quiet(), loading(own, "a tokenizer"):
            tokenizer = tokenizer_and_stops(ref, own)[0]
    except WeftError:
        if model.config.get_text_config().pad_token_id is None:
            raise
        return
    use_padding(model.config, padding(tokenizer, model.config)[0])


def load_model(
    ref: ModelRef,
    adapter: str | None,
    dtype: str,
    device: str,
    other_base: bool = False,
    quantize: str | None = None,
) -> tuple[Any, list[str]]:
    """Loads the model and the adapter, without a tokenizer. Returns the model and what loading the
    adapter noted. Raises ConfigError, WeftError.
    """
    if other_base and adapter is None:
        raise ConfigError("--other-base does nothing without --adapter.")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no CUDA device here. See `weft doctor`.")
    if quantize is not None:
        check_package(quantize, "--quantize")
    stored = None if adapter is None else read(adapter)
    task_class = None if stored is None else stored.base.get("class")
    model: Any = base_for(
        ref,
        task_class,
        {} if stored is None else stored.selected,
        dtype,
        *((0, 0) if stored is None else (stored.words, stored.new_rows)),
        quantize=quantize,
    )[0]
    notes = []
    if adapter is not None:
        notes = list(load(model, adapter, other_base=other_base).load_report.notes)
    place = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    return model.to(place).eval(), notes


def check_generates(model: Any) -> None:
    """Raises WeftError if the model generates no text."""
    if not _generates(model):
        raise WeftError(f"{type(model).__name__} generates no text.")


def _generates(model: Any) -> bool:
    return hasattr(model, "can_generate") and bool(model.can_generate())
