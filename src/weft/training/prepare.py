"""From a configuration to a tokenizer and encoded samples; no weights are loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from torch import nn

from ..encoding.image_batch import ImageCollator
from ..encoding.image_render import ImageRenderer
from ..encoding.labels import classes_of, encode_labels
from ..encoding.processor import Processor
from ..encoding.render import Renderer
from ..encoding.rows import EncodedRows
from ..encoding.samples import Samples, check_task, is_image
from ..encoding.tokenizer import max_tokens, tokenizer_and_stops
from ..errors import ConfigError
from ..inference.pretrained import empty_model, find_source, find_tokenizer
from ..model import prompts
from ..model.structure import Structure
from ..tasks import GenerationTask
from ..tasks.models import ModelRef, loading, quiet
from ..tasks.vocabulary import check_ids, learned_positions, padding
from . import processes
from .config.sections import LANGUAGE, DataSection, RunConfig
from .data import load_samples, load_task
from .image_text import open_for_images
from .new_tokens import NewTokens, add_new_tokens, check_start
from .pictures import ImageRows, check_text_keys, open_pictures
from .sources import check_source, has_splits
from .start import Start, open_start

DEFAULT_EPOCHS = 3
TOKENIZER = "model.tokenizer"  # the key


@dataclass(frozen=True)
class Sources:
    """The model and the tokenizer of a configuration, found but not loaded."""

    model: ModelRef
    tokenizer: ModelRef


@dataclass
class Data:
    """The samples of a run with its tokenizer (or image processor, if the model has one).

    kind: a key of `losses.METRICS`. classes: in the order of the model's outputs, for a
    classification. start: the adapter to begin with, if there is one. new_tokens: those of
    model.new_tokens. rendered_at: the time in the samples, if the chat template prints the date.
    processor, collator: of a vision-language model.
    """

    model: ModelRef
    tokenizer: Any
    kind: str
    format: str
    train: EncodedRows | ImageRows
    eval: EncodedRows | ImageRows | None
    pad: int
    classes: tuple[str, ...] | None = None
    notes: list[str] = field(default_factory=list)
    task: GenerationTask | None = None
    renderer: Renderer | None = None
    start: Start | None = None
    new_tokens: NewTokens = field(default_factory=NewTokens)
    rendered_at: datetime | None = None
    processor: Processor | None = None
    collator: ImageCollator | None = None

    @property
    def files(self) -> Any:
        """What is saved with an adapter to make the model's inputs, or None."""
        return self.tokenizer if self.processor is None else self.processor


@dataclass(frozen=True)
class Length:
    """The optimiser steps of the whole run and of one epoch."""

    steps: int
    per_epoch: int


def find_sources(config: RunConfig) -> Sources:
    """Finds the files, the model and the tokenizer that a configuration names.

    Raises ConfigError if one does not exist, before anything is loaded.
    """
    if config.task is not None:
        check_task(config.task)
    for key in ("train", "eval"):
        name = getattr(config.data, key)
        split = "split" if key == "train" else "eval_split"
        if name is not None:
            check_source(name, f"data.{key}")
        if (name is None or not has_splits(name)) and getattr(config.data, split) != getattr(
            DataSection, split
        ):
            raise ConfigError(
                f"data.{split} chooses a split of a hub name or of a saved data set, and data.{key} "
                f"is {name!r}."
            )
    template = config.data.chat_template
    if template is not None and not Path(template).expanduser().is_file():
        raise ConfigError(f"data.chat_template={template!r}: there is no such file.")
    tokenizer = (
        None
        if config.model.tokenizer is None
        else find_tokenizer(config.model.tokenizer, TOKENIZER)
    )
    model = find_source(config.model.path)
    return Sources(model, tokenizer or model)


def open_data(config: RunConfig, sources: Sources, now: datetime | None = None) -> Data:
    """Reads, renders and encodes the samples. `now` is the time for a chat template that prints the
    date, None that of the machine. Raises ConfigError or WeftError.
    """
    path = config.adapter.start
    start = None if path is None else open_start(path, config.method)
    if config.task is not None and is_image(config.task):
        return _open_images(config, config.task, sources, start)
    return _open_text(config, sources, start, now)


def length_of(config: RunConfig, samples: int) -> Length:
    """Returns the number of steps. Raises ConfigError if the warm-up takes all of them."""
    batches = math.ceil(math.ceil(samples / config.train.batch) / processes.count())
    per_epoch = math.ceil(batches / config.train.accumulate)
    steps = config.train.steps or per_epoch * (config.train.epochs or DEFAULT_EPOCHS)
    if config.optim.warm_up >= max(steps, 1):
        raise ConfigError(
            f"optim.warm_up={config.optim.warm_up:g} is all of the {steps} steps or more, so "
            "optim.lr would never be reached. Lower it; below 1 it is a share of the steps."
        )
    return Length(steps, per_epoch)


def _open_images(config: RunConfig, task: str, sources: Sources, start: Start | None) -> Data:
    check_text_keys(config)
    found = open_pictures(task, sources.model)
    return Data(
        model=sources.model,
        tokenizer=found.processor,
        kind="image-classification",
        format="image",
        train=found.train,
        eval=found.eval,
        pad=0,
        classes=found.classes,
        notes=found.notes,
        start=start,
    )


def _open_text(
    config: RunConfig, sources: Sources, start: Start | None, now: datetime | None
) -> Data:
    task, names = None, config.model.labels
    notes: list[str] = []
    if config.task is not None:
        train, evaluation, task, classes, decided = load_task(config.task)
        names = names or classes
        notes += decided
    else:
        train, evaluation = load_samples(config.data, config.model.kind, config.train.seed, names)
    kind = _kind(config, train, has_scores=config.task is not None and names is None)
    _check_keys(config, kind, train.format)
    with quiet(), loading(sources.model, "a configuration"):
        found = tokenizer_and_stops(sources.model, sources.tokenizer, TOKENIZER)
    tokenizer, model_config, stops = found
    processor = None
    if kind == "image-text":
        processor = open_for_images(config, sources.model, model_config)
        tokenizer = processor.tokenizer
    new_tokens = add_new_tokens(config, tokenizer, model_config, notes)
    if start is not None:
        check_start(start, tokenizer, new_tokens)
    architecture = empty_model(sources.model)
    limit = max_tokens(tokenizer, model_config, architecture)
    limit = _max_length(config, limit, _room(config, architecture), notes)
    pad, note = padding(tokenizer, model_config)
    notes += [] if note is None else [note]
    data = Data(
        model=sources.model,
        tokenizer=tokenizer,
        kind=kind,
        format=train.format,
        train=EncodedRows([]),
        eval=None,
        pad=pad,
        notes=notes,
        task=task,
        start=start,
        new_tokens=new_tokens,
        processor=processor,
        collator=None if processor is None else ImageCollator(processor, pad),
    )
    with quiet():  # texts that are too long are counted and reported at the end
        _encode(config, data, (train, evaluation), limit, stops, names, now)
    for what, rows in (("training", data.train), ("evaluation", data.eval)):
        ids = (row["input_ids"] for row in (rows.rows if isinstance(rows, EncodedRows) else ()))
        check_ids(ids, tokenizer, model_config, f"{what}, sample")
    data.notes += data.train.counts.notes("training")
    data.notes += data.eval.counts.notes("evaluation") if data.eval is not None else []
    return data


def _encode(
    config: RunConfig,
    data: Data,
    samples: tuple[Samples, Samples | None],
    limit: int,
    stops: set[int],
    names: tuple[str, ...] | None,
    now: datetime | None,
) -> None:
    train, evaluation = samples
    if data.kind in LANGUAGE:
        if config.data.chat_template is not None:  # saved with the tokenizer, for all later use
            data.tokenizer.chat_template = _read_template(config.data.chat_template)
        options: dict[str, Any] = {"loss_on": config.data.loss_on, "stops": stops, "now": now}
        renderer: Renderer = (
            Renderer(data.tokenizer, limit, **options)
            if data.processor is None
            else ImageRenderer(data.processor, limit, **options)
        )
        data.renderer = renderer
        if train.format == "messages" and renderer.template.prints_date():
            data.rendered_at = renderer.template.now
            data.notes.append(
                f"The chat template prints the date; all samples have {data.rendered_at:%Y-%m-%d}."
            )
        data.train = renderer.encode(train, "training")
        data.eval = None if evaluation is None else renderer.encode(evaluation, "evaluation")
    else:
        data.classes = (names or classes_of(train)) if data.kind == "classification" else None
        data.train = encode_labels(train, data.tokenizer, limit, data.classes)
        if evaluation is not None:
            data.eval = encode_labels(evaluation, data.tokenizer, limit, data.classes)


def _read_template(name: str) -> str:
    try:
        return Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"data.chat_template={name!r} cannot be read: {error}") from None


def _kind(config: RunConfig, train: Samples, has_scores: bool) -> str:
    """`has_scores`: the labels of a task are numbers."""
    labelled = "regression" if has_scores else "classification"
    images = any(row.get("images") for row in train.rows if train.format == "messages")
    language = "image-text" if images else "causal-lm"
    kind = config.model.kind or (labelled if train.format == "label" else language)
    if kind == "causal-lm" and images:
        raise ConfigError(
            "model.kind=causal-lm and data with images do not go together. Leave model.kind out, or "
            "leave the images out with data.ignore."
        )
    if (kind in LANGUAGE) == (train.format == "label"):
        raise ConfigError(
            f"model.kind={kind} and data of the format {train.format!r} do not go together"
            + (
                " (data.format=label needs classification or regression)."
                if kind in LANGUAGE
                else " (classification and regression need the columns text and label)."
            )
        )
    if config.model.labels is not None and kind != "classification":
        raise ConfigError(f"model.labels names classes, and model.kind is {kind}.")
    return kind


def _check_keys(config: RunConfig, kind: str, form: str) -> None:
    """Raises ConfigError for a key that would be ignored with this kind and format of data."""
    if config.data.chat_template is not None and form != "messages":
        raise ConfigError(
            "data.chat_template is for data.format=messages, and this data has the format "
            f"{form!r}."
        )
    if config.data.loss_on == "all" and form not in ("prompt", "messages"):
        raise ConfigError(
            f"data.loss_on=all has no meaning for data of the format {form!r}; leave it out."
        )
    if config.optim.label_smoothing and kind == "regression":
        raise ConfigError("optim.label_smoothing has no meaning for a regression; leave it out.")
    if config.eval.records is not None and (config.task is None or form != "prompt"):
        raise ConfigError("eval.records is for a task whose answers are generated; leave it out.")


def _room(config: RunConfig, model: nn.Module) -> int | None:
    """The learned positions that the method's virtual tokens leave for text, or None if a model has
    no table of them.
    """
    learned = learned_positions(model)
    if learned is None:
        return None
    virtual = prompts.virtual_positions(Structure.of(model), config.method)
    if virtual >= learned:
        raise ConfigError(
            f"method: its {virtual} virtual tokens leave none of the model's {learned} positions "
            "for text. Take fewer."
        )
    return learned - virtual


def _max_length(config: RunConfig, limit: int, room: int | None, notes: list[str]) -> int:
    """data.max_length, or the model's limit if that is less."""
    limit = limit if room is None else min(limit, room)
    if config.data.max_length > limit:
        notes.append(
            f"data.max_length={config.data.max_length} is more than this model takes; samples are "
            f"cut at {limit}."
        )
    return min(config.data.max_length, limit)
