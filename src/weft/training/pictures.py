"""Images for `weft train`: a task's splits as rows for the trainer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import ConfigError
from ..tasks import Labelled, find_task
from ..tasks.images import encode
from ..tasks.models import ModelRef, image_processor, loading, quiet
from .config import DataSection, RunConfig
from .render import Counts


@dataclass(frozen=True)
class ImageRows:
    """What the trainer asks of samples, over a split of images that may be read batch by batch."""

    split: Labelled
    counts: Counts = field(default_factory=Counts)

    def __len__(self) -> int:
        return len(self.split.labels)

    def __getitem__(self, place: int) -> dict[str, Any]:
        pixels = self.split.batch(torch.tensor([place]))
        return {
            **{key: value[0] for key, value in pixels.items()},
            "labels": int(self.split.labels[place]),
        }

    def fingerprint(self) -> str:
        """16 hex digits over all images and labels, in order."""
        return self.split.fingerprint()


@dataclass(frozen=True)
class Pictures:
    """A task of images, ready for one model; `processor` is None where the model has none."""

    train: ImageRows
    eval: ImageRows
    classes: tuple[str, ...]
    processor: Any | None
    notes: list[str]


def check_text_keys(config: RunConfig) -> None:
    """No key that is for text. Raises ConfigError."""
    plain = DataSection()
    given = [
        f"data.{name}"
        for name in ("max_length", "loss_on")
        if getattr(config.data, name) != getattr(plain, name)
    ]
    given += [
        key
        for key, value in (
            ("model.tokenizer", config.model.tokenizer),
            ("model.labels", config.model.labels),
            ("eval.records", config.eval.records),
        )
        if value is not None
    ]
    if given:
        raise ConfigError(
            f"{given[0]} has no meaning for task={config.task!r}, which has images and brings its "
            "classes; "
            "leave it out."
        )
    if config.model.kind not in (None, "classification"):
        raise ConfigError(
            f"model.kind={config.model.kind} and task={config.task!r} do not go together; images "
            "are for "
            "classification."
        )


def open_pictures(name: str, ref: ModelRef) -> Pictures:
    """Read a task's images and make them ready for the model at `ref`; no weights are loaded.
    Raises WeftError.
    """
    import transformers

    task = find_task(name).load()
    notes = list(task.notes)
    with quiet(), loading(ref, "a configuration and an image processor"):
        shape = transformers.AutoConfig.from_pretrained(ref.source, local_files_only=ref.local)
        processor = image_processor(ref, shape, notes)
    train, held = (
        encode(task.splits[split], shape, processor) for split in ("train", "validation")
    )
    return Pictures(
        ImageRows(train, Counts(len(train.labels))),
        ImageRows(held, Counts(len(held.labels))),
        task.classes,
        processor,
        notes,
    )
