"""The scores of a model on a task (`weft eval`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..encoding.collate import collate
from ..encoding.labels import encode_labels
from ..encoding.samples import is_generation, label_samples
from ..errors import ConfigError, WeftError
from ..tasks import GenerationTask, Report, Task, find_generation, find_task
from ..tasks.images import encode
from ..tasks.metrics import METRICS, NO_VARIATION
from ..tasks.models import image_processor, loading, quiet
from ..tasks.vocabulary import check_ids, padding
from .generate import answer
from .opened import Opened, load_model
from .pretrained import find_source, is_classifier

MAX_LABELLED_TOKENS = 512  # per text, as data.max_length is by default


@dataclass(frozen=True)
class Evaluated:
    """A task's scores on one split. `outputs` are the generated answers, if the task has text."""

    task: str
    split: str
    examples: int
    report: Report
    outputs: list[str] | None = None


def evaluate(
    opened: Opened, name: str, split: str = "test", limit: int | None = None, batch: int = 8
) -> Evaluated:
    """Scores the first `limit` examples of a task of `weft.tasks` with text.

    Raises ConfigError if there is no such task or split, WeftError if the model is of another kind.
    """
    if is_generation(name):
        return _score_generation(opened, find_generation(name).load(), split, limit, batch)
    return _score_labelled(opened, find_task(name).load(), split, limit, batch)


def _score_generation(
    opened: Opened, task: GenerationTask, split: str, limit: int | None, batch: int
) -> Evaluated:
    if not hasattr(opened.model, "generate") or not opened.model.can_generate():
        raise WeftError(
            f"task {task.name!r} needs text, and {type(opened.model).__name__} generates none."
        )
    records = task.eval_records(split)[:limit]
    texts = answer(
        opened.model, opened.renderer, [r["prompt"] for r in records], task.generation, batch
    )
    return Evaluated(task.name, split, len(records), task.scorer(texts, records), texts)


@torch.no_grad()
def _score_labelled(
    opened: Opened, task: Task, split: str, limit: int | None, batch: int
) -> Evaluated:
    _check_split(task, split)
    outputs = getattr(opened.model.config, "num_labels", 0)
    if not is_classifier(opened.model) or outputs != (len(task.classes) or 1):
        raise WeftError(
            f"task {task.name!r} has {len(task.classes) or 'no'} classes, and the model is a "
            f"{type(opened.model).__name__} with {outputs} outputs. Give the adapter that was "
            "trained for it."
        )
    samples = label_samples(task, split)
    length = min(opened.limit, MAX_LABELLED_TOKENS)
    rows = encode_labels(samples, opened.tokenizer, length, task.classes or None).rows[:limit]
    parts: list[torch.Tensor] = []
    model: nn.Module = opened.model
    tokenizer, config = opened.tokenizer, opened.model.config
    check_ids((row["input_ids"] for row in rows), tokenizer, config, f"{task.name}, example")
    pad = padding(tokenizer, config)[0]
    for start in range(0, len(rows), batch):
        inputs = collate(rows[start : start + batch], pad)
        del inputs["labels"]
        found = model(**{k: v.to(opened.model.device) for k, v in inputs.items()})
        parts.append(found.logits.float().cpu())
    logits = torch.cat(parts)
    predicted = (logits.argmax(1) if task.classes else logits.squeeze(-1)).tolist()
    score = METRICS[task.metric](predicted, [row["labels"] for row in rows])
    reasons = {} if score is not None else {task.metric: NO_VARIATION}
    return Evaluated(task.name, split, len(rows), Report({task.metric: score}, reasons, task.notes))


@torch.no_grad()
def evaluate_images(
    model: str,
    adapter: str | None,
    name: str,
    split: str = "test",
    limit: int | None = None,
    batch: int = 8,
    dtype: str = "auto",
    device: str = "auto",
    other_base: bool = False,
    quantize: str | None = None,
) -> Evaluated:
    """Scores the first `limit` examples of a task of images.

    Raises ConfigError if there is no such task or split, WeftError if the model is of another kind.
    """
    ref, task = find_source(model), find_task(name).load()
    _check_split(task, split)
    loaded, noted = load_model(ref, adapter, dtype, device, other_base, quantize)
    outputs = getattr(loaded.config, "num_labels", 0)
    if "ImageClassification" not in type(loaded).__name__ or outputs != len(task.classes):
        raise WeftError(
            f"task {task.name!r} has {len(task.classes)} classes of images, and the model is a "
            f"{type(loaded).__name__} with {outputs} outputs. Give the adapter that was trained "
            "for it."
        )
    notes = [*task.notes, *noted]
    with quiet(), loading(ref, "an image processor"):
        processor = image_processor(ref, loaded.config, notes)
    examples = task.splits[split]
    chosen = examples.take(range(min(len(examples), limit or len(examples))))
    images = encode(chosen, loaded.config, processor)
    predicted: list[int] = []
    for start in range(0, len(images.labels), batch):
        rows = torch.arange(start, min(start + batch, len(images.labels)))
        inputs = {
            key: value.to(loaded.device, loaded.dtype) for key, value in images.batch(rows).items()
        }
        predicted += loaded(**inputs).logits.float().argmax(1).tolist()
    score = METRICS[task.metric](predicted, images.labels.tolist())
    report = Report({task.metric: score}, {}, tuple(notes))
    return Evaluated(task.name, split, len(predicted), report)


def _check_split(task: Task, split: str) -> None:
    if split not in task.splits:
        raise ConfigError(
            f"task {task.name!r} has no split {split!r}. It has {sorted(task.splits)}."
        )
