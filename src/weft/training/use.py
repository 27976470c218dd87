"""A finished adapter at work: a task's scores (`weft eval`) and text (`weft generate`)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn

from ..checkpoint.load import load, read
from ..errors import ConfigError, WeftError
from ..tasks import GenerationTask, Report, Task, find_generation, find_task
from ..tasks.images import encode
from ..tasks.metrics import METRICS, NO_VARIATION
from ..tasks.models import ModelRef, image_processor, loading, quiet
from .data import is_generation, label_samples
from .generate import answer
from .losses import collate
from .prepare import most_tokens, tokenizer_and_stops
from .pretrained import find_source, model_for
from .render import Renderer, encode_labels


@dataclass(frozen=True)
class Opened:
    """A model with its adapter active (or none), on its device, and its tokenizer."""

    model: Any
    tokenizer: Any
    renderer: Renderer
    limit: int


@dataclass(frozen=True)
class Evaluated:
    """A task's scores on one split. `outputs`: the generated answers, where the task has some."""

    task: str
    split: str
    examples: int
    report: Report
    outputs: list[str] | None = None


def open_model(
    model: str,
    adapter: str | None,
    dtype: str = "auto",
    device: str = "auto",
    template: str | None = None,
) -> Opened:
    """Load the base and the adapter. Raises ConfigError (no such place), WeftError (they do not
    fit).
    """
    ref = find_source(model)
    with quiet(), loading(ref, "a tokenizer and a configuration"):
        tokenizer, shape, stops = tokenizer_and_stops(ref, ref)
    limit = most_tokens(tokenizer, shape)
    return Opened(
        loaded(ref, adapter, dtype, device),
        tokenizer,
        Renderer(tokenizer, limit, template=template, stops=stops),
        limit,
    )


def loaded(ref: ModelRef, adapter: str | None, dtype: str, device: str) -> Any:
    """The model with the adapter active, on its device. Raises what `open_model` does."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no CUDA device here. See `weft doctor`.")
    stored = None if adapter is None else read(adapter)
    made = model_for(
        ref,
        None if stored is None else stored.base.get("class"),
        {} if stored is None else stored.selected,
        dtype,
    )
    if adapter is not None:
        load(made, adapter)
    return made.to("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu").eval()


def evaluate(
    opened: Opened, name: str, split: str = "test", most: int | None = None, batch: int = 8
) -> Evaluated:
    """Score a task of `weft.tasks`. Raises ConfigError (no such task or split), WeftError (the
    model is of another kind).
    """
    if is_generation(name):
        return _generated(opened, find_generation(name).load(), split, most, batch)
    return _labelled(opened, find_task(name).load(), split, most, batch)


def _generated(
    opened: Opened, task: GenerationTask, split: str, most: int | None, batch: int
) -> Evaluated:
    if not hasattr(opened.model, "generate") or not opened.model.can_generate():
        raise WeftError(
            f"task {task.name!r} wants text, and {type(opened.model).__name__} generates none."
        )
    records = task.eval_records(split)[:most]
    texts = answer(
        opened.model, opened.renderer, [r["prompt"] for r in records], task.generation, batch
    )
    return Evaluated(task.name, split, len(records), task.scorer(texts, records), texts)


@torch.no_grad()
def _labelled(opened: Opened, task: Task, split: str, most: int | None, batch: int) -> Evaluated:
    if split not in task.splits:
        raise ConfigError(
            f"task {task.name!r} has no split {split!r}. It has {sorted(task.splits)}."
        )
    outputs = getattr(opened.model.config, "num_labels", 0)
    if "SequenceClassification" not in type(opened.model).__name__ or outputs != (
        len(task.classes) or 1
    ):
        raise WeftError(
            f"task {task.name!r} has {len(task.classes) or 'no'} classes, and the model is a "
            f"{type(opened.model).__name__} with {outputs} outputs. Give the adapter that was "
            "trained for it."
        )
    samples = label_samples(task, split)
    limit = min(opened.limit, 512)
    rows = encode_labels(samples, opened.tokenizer, limit, task.classes or None).rows[:most]
    found: list[torch.Tensor] = []
    model: nn.Module = opened.model
    pad = opened.tokenizer.pad_token_id or 0
    for start in range(0, len(rows), batch):
        inputs = collate(rows[start : start + batch], pad)
        del inputs["labels"]
        found.append(
            model(**{k: v.to(opened.model.device) for k, v in inputs.items()}).logits.float().cpu()
        )
    logits = torch.cat(found)
    said = (logits.argmax(1) if task.classes else logits.squeeze(-1)).tolist()
    score = METRICS[task.metric](said, [row["labels"] for row in rows])
    reasons = {} if score is not None else {task.metric: NO_VARIATION}
    return Evaluated(task.name, split, len(rows), Report({task.metric: score}, reasons, task.notes))


@torch.no_grad()
def evaluate_images(
    model: str,
    adapter: str | None,
    name: str,
    split: str = "test",
    most: int | None = None,
    batch: int = 8,
    dtype: str = "auto",
    device: str = "auto",
) -> Evaluated:
    """Score a task of images. Raises ConfigError (no such task or split), WeftError (the model is
    of another kind).
    """
    ref, task = find_source(model), find_task(name).load()
    if split not in task.splits:
        raise ConfigError(
            f"task {task.name!r} has no split {split!r}. It has {sorted(task.splits)}."
        )
    made = loaded(ref, adapter, dtype, device)
    outputs = getattr(made.config, "num_labels", 0)
    if "ImageClassification" not in type(made).__name__ or outputs != len(task.classes):
        raise WeftError(
            f"task {task.name!r} has {len(task.classes)} classes of images, and the model is a "
            f"{type(made).__name__} with {outputs} outputs. Give the adapter that was trained for "
            "it."
        )
    notes = list(task.notes)
    with quiet(), loading(ref, "an image processor"):
        processor = image_processor(ref, made.config, notes)
    held = task.splits[split]
    ready = encode(held.take(range(min(len(held), most or len(held)))), made.config, processor)
    said: list[int] = []
    for start in range(0, len(ready.labels), batch):
        rows = torch.arange(start, min(start + batch, len(ready.labels)))
        inputs = {
            key: value.to(made.device, made.dtype) for key, value in ready.batch(rows).items()
        }
        said += made(**inputs).logits.float().argmax(1).tolist()
    score = METRICS[task.metric](said, ready.labels.tolist())
    return Evaluated(task.name, split, len(said), Report({task.metric: score}, {}, tuple(notes)))


def generate(
    opened: Opened, prompts: Sequence[str], settings: dict[str, Any], chat: bool, batch: int = 8
) -> list[str]:
    """Continuations of prompts; with `chat` each is a user's message for the tokenizer's chat
    template.
    """
    check_settings(settings)
    if not opened.model.can_generate():
        raise WeftError(f"{type(opened.model).__name__} generates no text.")
    renderer = opened.renderer
    if chat:
        prompts = [
            renderer.chat_prompt([{"role": "user", "content": prompt}]) for prompt in prompts
        ]
        renderer = renderer.bare()
    return answer(opened.model, renderer, prompts, settings, batch)


def check_settings(settings: Iterable[str]) -> None:
    """Every name is a setting of `model.generate`. Raises ConfigError with the nearest names."""
    from transformers import GenerationConfig

    known = GenerationConfig().to_dict()
    for key in settings:
        if key not in known:
            near = get_close_matches(key, known, n=2) or [
                "max_new_tokens",
                "num_beams",
                "do_sample",
            ]
            raise ConfigError(
                f"--set {key}: model.generate has no setting of that name. Nearest: "
                f"{', '.join(near)}."
            )
