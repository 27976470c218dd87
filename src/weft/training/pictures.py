"""Images for `weft train`: a task's splits as rows for the trainer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ..encoding.rows import Counts
from ..errors import ConfigError
from ..tasks import Labelled, find_task
from ..tasks.images import encode
from ..tasks.models import ModelRef, image_processor, loading, quiet
from .config.sections import DataSection, RunConfig


@dataclass(frozen=True)
class ImageRows:
    """Samples for the trainer over a split of images, which may be read batch by batch."""

    split: Labelled
    counts: Counts = field(default_factory=Counts)

    def __len__(self) -> int:
        return len(self.split.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pixels = self.split.batch(torch.tensor([index]))
        return {
            **{key: value[0] for key, value in pixels.items()},
            "labels": int(self.split.labels[index]),
        }

    def fingerprint(self) -> str:
        """Returns 16 hex digits over all images and labels, in order."""
        return self.split.fingerprint()


@dataclass(frozen=True)
class Pictures:
    """A task of images, ready for one model. `processor` is None if the model has none."""

    train: ImageRows
    eval: ImageRows
    classes: tuple[str, ...]
    processor: Any | None
    notes: list[str]


def check_text_keys(config: RunConfig) -> None:
    """Raises ConfigError if a key for text is given."""
    unset = DataSection()
    given = [
        f"data.{name}"
        for name in ("max_length", "loss_on")
        if getattr(config.data, name) != getattr(unset, name)
    ]
    given += [
        key
        for key, value in (
            ("model.tokenizer", config.model.tokenizer),
            ("model.labels", config.model.labels),
            ("model.new_tokens", config.model.new_tokens),
            ("eval.records", config.eval.records),
        )
        if value is not None
    ]
    if given:
        raise ConfigError(
            f"{given[0]} has no meaning for task={config.task!r}, which has images and brings its "
            "classes; leave it out."
        )
    if config.model.kind not in (None, "classification"):
        raise ConfigError(
            f"model.kind={config.model.kind} and task={config.task!r} do not go together; images "
            "are for classification."
        )


def open_pictures(name: str, ref: ModelRef) -> Pictures:
    """Reads a task's images and prepares them for the model, without loading weights. Raises
    ConfigError or WeftError.
    """
    import transformers

    task = find_task(name).load()
    notes = list(task.notes)
    with quiet(), loading(ref, "a configuration and an image processor"):
        model_config = transformers.AutoConfig.from_pretrained(ref.source, **ref.options)
        processor = image_processor(ref, model_config, notes)
    train, evaluation = (
        encode(task.splits[split], model_config, processor) for split in ("train", "validation")
    )
    return Pictures(
        ImageRows(train, Counts(len(train.labels))),
        ImageRows(evaluation, Counts(len(evaluation.labels))),
        task.classes,
        processor,
        notes,
    )
