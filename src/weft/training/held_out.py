"""The loss of a language model on held-out samples (`weft eval --data`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

from ..encoding.collate import collate
from ..encoding.image_batch import ImageCollator
from ..encoding.samples import Samples
from ..errors import ConfigError
from ..inference.opened import Opened, check_generates
from ..tasks.vocabulary import check_ids, padding
from .config.sections import DataSection
from .data import load_samples
from .losses import metrics_for, reduced
from .sources import check_source


@dataclass(frozen=True)
class HeldOut:
    """Scores on the samples of a file: loss, perplexity and token_accuracy over all tokens in the
    loss.
    """

    samples: int
    scores: Mapping[str, float]
    notes: list[str] = field(default_factory=list)


def read_held_out(name: str, limit: int | None = None) -> Samples:
    """Returns the first `limit` samples of a file in a format of `weft train` with text to learn.
    Raises ConfigError, WeftError.
    """
    check_source(name, "--data")
    samples, _ = load_samples(DataSection(train=name), "causal-lm", 0)
    return samples.take(range(min(len(samples), limit or len(samples))))


def has_images(samples: Samples) -> bool:
    """Whether a sample has images, for which a model needs its processor."""
    return any(row.get("images") for row in samples.rows)


@torch.no_grad()
def held_out_loss(opened: Opened, samples: Samples, batch: int = 8) -> HeldOut:
    """Scores a model in eval mode. Samples are cut at the model's own limit only. Raises WeftError
    if a sample cannot be rendered.
    """
    model = opened.model
    check_generates(model)
    if model.config.is_encoder_decoder:
        raise ConfigError(f"--data: {type(model).__name__} is no causal language model.")
    rows = opened.renderer.encode(samples, samples.source)
    check_ids((row["input_ids"] for row in rows.rows), opened.tokenizer, model.config, "sample")
    pad = padding(opened.tokenizer, model.config)[0]
    collator: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]] = (
        (lambda chosen: collate(chosen, pad))
        if opened.processor is None
        else ImageCollator(opened.processor, pad)
    )
    sums = []
    for start in range(0, len(rows), batch):
        inputs = {
            key: value.to(model.device, model.dtype if value.is_floating_point() else None)
            for key, value in collator(rows.rows[start : start + batch]).items()
        }
        labels = inputs.pop("labels")
        sums.append(reduced(model(**inputs).logits, labels).cpu())
    found = SimpleNamespace(predictions=torch.cat(sums).numpy())
    notes = rows.counts.notes(samples.source, "the model's limit")
    return HeldOut(len(rows), metrics_for("causal-lm")(found), notes)
