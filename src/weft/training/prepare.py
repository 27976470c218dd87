"""From a configuration to a tokenizer, encoded samples and a model with its adapter."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError, WeftError
from ..model.adapter import Adapter
from ..model.attach import attach
from ..tasks import GenerationTask
from ..tasks.models import ModelRef, loading, quiet
from .config import DataSection, RunConfig
from .data import Samples, check_source, check_task, is_image, load_samples, load_task
from .pictures import ImageRows, check_text_keys, open_pictures
from .pretrained import find_source
from .render import Encoded, Renderer, classes_of, encode_labels
from .start import Start, begin_with, check_base, open_start, said

_AUTO = {
    "causal-lm": "AutoModelForCausalLM",
    "classification": "AutoModelForSequenceClassification",
    "image-classification": "AutoModelForImageClassification",
    "regression": "AutoModelForSequenceClassification",
}


@dataclass
class Data:
    """Tokenizer (or image processor, if the model has one) and samples of a run. `classes`: of a
    classification, in the order of the model's outputs.
    """

    ref: ModelRef
    tokenizer: Any
    kind: str
    format: str
    train: Encoded | ImageRows
    eval: Encoded | ImageRows | None
    pad: int
    classes: tuple[str, ...] | None = None
    notes: list[str] = field(default_factory=list)
    task: GenerationTask | None = None
    renderer: Renderer | None = None
    start: Start | None = None
    started: dict[str, Any] | None = None  # what became of it


def check_places(config: RunConfig) -> ModelRef:
    """Files that must exist, before anything is loaded. Raises ConfigError."""
    if config.task is not None:
        check_task(config.task)
    for key in ("train", "eval"):
        name = getattr(config.data, key)
        split = "split" if key == "train" else "eval_split"
        if name is not None:
            check_source(name, f"data.{key}")
        local = name is None or Path(name).expanduser().is_file()
        if local and getattr(config.data, split) != getattr(DataSection, split):
            raise ConfigError(
                f"data.{split} chooses a split of a hub name, and data.{key} is {name!r}."
            )
    template = config.data.chat_template
    if template is not None and not Path(template).expanduser().is_file():
        raise ConfigError(f"data.chat_template={template!r}: there is no such file.")
    if config.model.tokenizer is not None:
        find_source(config.model.tokenizer)
    return find_source(config.model.path)


def open_data(config: RunConfig) -> Data:
    """Read, render and encode the samples; no weights are loaded. Raises WeftError."""
    ref = check_places(config)
    start = (
        None if config.adapter.start is None else open_start(config.adapter.start, config.method)
    )
    if config.task is not None and is_image(config.task):
        check_text_keys(config)
        found = open_pictures(config.task, ref)
        return Data(
            ref,
            found.processor,
            "image-classification",
            "image",
            found.train,
            found.eval,
            0,
            found.classes,
            found.notes,
            start=start,
        )
    task, names = None, config.model.labels
    decided: tuple[str, ...] = ()
    if config.task is not None:
        train, held, task, classes, decided = load_task(config.task)
        names = names or classes
    else:
        train, held = load_samples(config.data, config.model.kind, config.train.seed)
    kind = _kind(config, train, config.task is not None and names is None)
    _check_used(config, kind, train.format)
    with quiet(), loading(ref, "a tokenizer and a configuration"):
        own = ref if config.model.tokenizer is None else find_source(config.model.tokenizer)
        tokenizer, shape, stops = tokenizer_and_stops(ref, own)
    notes: list[str] = [*decided]
    limit = _limit(config, tokenizer, shape, notes)
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = tokenizer.eos_token_id or 0
        notes.append(
            f"The tokenizer has no pad token; rows are padded with token {pad}, which is masked."
        )
    data = Data(
        ref, tokenizer, kind, train.format, Encoded([]), None, pad, None, notes, task, start=start
    )
    with quiet():  # that a text is longer than the model takes is counted, and told at the end
        _encode(config, data, (train, held), limit, stops, names)
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
) -> None:
    (train, held), tokenizer = samples, data.tokenizer
    if data.kind == "causal-lm":
        template = config.data.chat_template
        text = None if template is None else Path(template).expanduser().read_text(encoding="utf-8")
        data.renderer = renderer = Renderer(tokenizer, limit, config.data.loss_on, text, stops)
        data.train = renderer.encode(train, "training")
        data.eval = None if held is None else renderer.encode(held, "evaluation")
    else:
        data.classes = (names or classes_of(train)) if data.kind == "classification" else None
        data.train = encode_labels(train, tokenizer, limit, data.classes)
        data.eval = None if held is None else encode_labels(held, tokenizer, limit, data.classes)


def open_model(config: RunConfig, data: Data) -> tuple[nn.Module, Adapter, list[str]]:
    """The pretrained model with the method attached, and the names of base tensors that the
    checkpoint did not have.

    Modules with such tensors (a new head) are trained beside the method, from values drawn from the
    seed, or from those of `adapter.start` where they are there.
    """
    model, missing = _pretrained(config, data)
    method = config.method
    if missing:
        if data.kind == "causal-lm" or len(missing) > len(model.state_dict()) // 2:
            raise WeftError(
                f"model {data.ref.name!r} has no weights for {missing[0]!r} ({len(missing)} "
                "tensors in all); "
                "they would be random. Give a checkpoint of this architecture."
            )
        modules = list(dict.fromkeys(name.rpartition(".")[0] for name in missing))
        if not all(modules):
            raise WeftError(
                f"{missing[0]!r} is not in the checkpoint and belongs to no module that could be "
                "trained."
            )
        method = replace(
            method, modules_to_save=tuple(dict.fromkeys([*method.modules_to_save, *modules]))
        )
        data.notes.append(
            f"Not in the checkpoint, so trained from new values: {', '.join(modules)}."
        )
    if data.start is not None:
        check_base(data.start, model, missing)
    adapter = attach(model, method)
    if data.start is not None:
        data.started = begin_with(data.start, adapter, missing)
        data.notes.append(said(data.started))
    return model, adapter, missing


def _kind(config: RunConfig, train: Samples, scores: bool) -> str:
    """`scores`: the labels of a task are numbers."""
    labelled = "regression" if scores else "classification"
    kind = config.model.kind or (labelled if train.format == "label" else "causal-lm")
    if (kind == "causal-lm") == (train.format == "label"):
        raise ConfigError(
            f"model.kind={kind} and data of the format {train.format!r} do not go together"
            + (
                " (data.format=label needs classification or regression)."
                if kind == "causal-lm"
                else " (classification and regression need the columns text and label)."
            )
        )
    if config.model.labels is not None and kind != "classification":
        raise ConfigError(f"model.labels names classes, and model.kind is {kind}.")
    return kind


def _check_used(config: RunConfig, kind: str, form: str) -> None:
    """No key is given that this kind of data would ignore. Raises ConfigError."""
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


def tokenizer_and_stops(ref: ModelRef, own: ModelRef) -> tuple[Any, Any, set[int]]:
    """The tokenizer at `own`, the model's configuration, and the ids at which its generation
    stops.
    """
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(own.source, local_files_only=own.local)
    shape = AutoConfig.from_pretrained(ref.source, local_files_only=ref.local)
    stops = [getattr(shape, "eos_token_id", None)]
    if not ref.local or (Path(ref.source) / "generation_config.json").is_file():
        stops.append(
            GenerationConfig.from_pretrained(ref.source, local_files_only=ref.local).eos_token_id
        )
    flat = {
        i
        for stop in stops
        for i in (stop if isinstance(stop, list) else [stop])
        if isinstance(i, int)
    }
    return tokenizer, shape, flat


def most_tokens(tokenizer: Any, shape: Any) -> int:
    """What tokenizer and model say they can take."""
    places = getattr(shape, "max_position_embeddings", None) or getattr(shape, "n_positions", None)
    return int(min(tokenizer.model_max_length, places or tokenizer.model_max_length))


def _limit(config: RunConfig, tokenizer: Any, shape: Any, notes: list[str]) -> int:
    """max_length, or what the model can take where that is less."""
    most = most_tokens(tokenizer, shape)
    if config.data.max_length > most:
        notes.append(
            f"data.max_length={config.data.max_length} is more than this model takes; samples are "
            f"cut at {most}."
        )
    return int(min(config.data.max_length, most))


def _pretrained(config: RunConfig, data: Data) -> tuple[nn.Module, list[str]]:
    import transformers

    ref, heads = data.ref, data.kind != "causal-lm"
    with quiet(), loading(ref, _AUTO[data.kind]):
        changes: dict[str, Any] = {}
        if heads:
            names = data.classes or ("value",)
            changes = {
                "num_labels": len(names),
                "id2label": dict(enumerate(names)),
                "label2id": {name: i for i, name in enumerate(names)},
            }
        shape = transformers.AutoConfig.from_pretrained(
            ref.source, local_files_only=ref.local, **changes
        )
        if heads and data.kind != "image-classification":
            shape.pad_token_id = data.pad
        if heads:
            shape.problem_type = "single_label_classification" if data.classes else "regression"
        torch.manual_seed(config.train.seed)  # of a new head
        dtype = config.model.dtype
        model, report = getattr(transformers, _AUTO[data.kind]).from_pretrained(
            ref.source,
            config=shape,
            dtype="auto" if dtype == "auto" else getattr(torch, dtype),
            use_safetensors=True,
            ignore_mismatched_sizes=heads,
            output_loading_info=True,
            local_files_only=ref.local,
        )
    mismatched = [key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]]
    return model, sorted({*report["missing_keys"], *mismatched})
