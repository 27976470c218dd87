"""From a configuration and its data to the pretrained model with the adapter attached."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint.loftq import loftq
from ..errors import ConfigError, WeftError
from ..inference.pretrained import grow_embeddings
from ..model import statistics
from ..model.adapter import Adapter
from ..model.attach import attach_noted
from ..tasks.models import ModelRef, loading, quiet
from ..tasks.quantize import loading_options
from ..tasks.vocabulary import use_padding
from .config.sections import LANGUAGE, RunConfig
from .prepare import Data
from .start import check_base, describe, load_start

AUTO_CLASSES = {
    "causal-lm": "AutoModelForCausalLM",
    "image-text": "AutoModelForImageTextToText",
    "classification": "AutoModelForSequenceClassification",
    "image-classification": "AutoModelForImageClassification",
    "regression": "AutoModelForSequenceClassification",
}


@dataclass
class Adapted:
    """A model with its adapter. `missing` names the base tensors that are in no checkpoint;
    `started` is the record of adapter.start in run.json.
    """

    adapter: Adapter
    missing: list[str]
    started: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)


def load_adapted(config: RunConfig, data: Data) -> Adapted:
    """Loads the model and attaches the method.

    Modules with tensors that are in no checkpoint (a new head) are trained with the method, from
    values drawn from the seed, or from those of adapter.start if it has them. Raises WeftError if
    the checkpoint does not fit, TargetError if the method does not, and ConfigError or
    CheckpointError if adapter.start does not.
    """
    model, missing = _load_base(config, data)
    modules = _new_modules(model, missing, data)
    notes, method = [], config.method
    if modules:
        trained = tuple(dict.fromkeys([*method.modules_to_save, *modules]))
        method = replace(method, modules_to_save=trained)
        notes.append(f"Not in the checkpoint, so trained from new values: {', '.join(modules)}.")
    if data.new_tokens.ids:
        grow_embeddings(model, data.new_tokens.words, data.new_tokens.words)
        method = replace(method, new_tokens=data.new_tokens.ids)
    if data.start is not None and not config.adapter.other_base:
        check_base(data.start, config, model, missing)
    adapter = attach_noted(model, method)
    notes += adapter.notes
    _check_statistics(model)
    adapted = Adapted(adapter, missing, notes=notes)
    if data.start is not None:
        adapted.started = load_start(data.start, adapter, missing, config.adapter.other_base)
        notes += [describe(adapted.started), *adapted.started["notes"]]
    if config.adapter.loftq:
        notes.append(str(loftq(model, _weights_of(data.model), adapter.name)))
    return adapted


def _weights_of(source: ModelRef) -> Path:
    """The folder with the weights of a model before it was quantised."""
    from transformers.utils import cached_file

    if Path(source.source).is_dir():
        return Path(source.source)
    # The model was loaded, so its files lie beside each other in the cache.
    return Path(cached_file(source.source, "config.json", local_files_only=True)).parent


def _check_statistics(model: nn.Module) -> None:
    """Raises ConfigError if training would move statistics, which no adapter file contains."""
    moving = statistics.moving(model)
    if moving:
        raise ConfigError(
            f"{len(moving)} batch norms of the frozen base, {moving[0]!r} first, would move their "
            "running statistics in training, and an adapter does not contain them. Keep them with "
            "method.freeze_batch_norm=true."
        )


def _new_modules(model: nn.Module, missing: list[str], data: Data) -> list[str]:
    """The modules to train from new values. Raises WeftError if only a head may be new and more
    is.
    """
    if not missing:
        return []
    if data.kind in LANGUAGE or len(missing) > len(model.state_dict()) // 2:
        raise WeftError(
            f"model {data.model.name!r} has no weights for {missing[0]!r} ({len(missing)} tensors "
            "in all); they would be random. Give a checkpoint of this architecture."
        )
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in missing))
    if not all(modules):
        raise WeftError(
            f"{missing[0]!r} is not in the checkpoint and belongs to no module that could be "
            "trained."
        )
    return modules


def _load_base(config: RunConfig, data: Data) -> tuple[nn.Module, list[str]]:
    import transformers

    source, has_head = data.model, data.kind not in LANGUAGE
    name = AUTO_CLASSES[data.kind]
    with quiet(), loading(source, name):
        changes: dict[str, Any] = {}
        if has_head:
            names = data.classes or ("value",)
            changes = {
                "num_labels": len(names),
                "id2label": dict(enumerate(names)),
                "label2id": {name: i for i, name in enumerate(names)},
            }
        model_config = transformers.AutoConfig.from_pretrained(
            source.source, **source.options, **changes
        )
        if has_head and data.kind != "image-classification":
            use_padding(model_config, data.pad)
        if has_head:
            problem = "single_label_classification" if data.classes else "regression"
            model_config.problem_type = problem
        torch.manual_seed(config.train.seed)  # a new head is drawn from it
        auto_class = getattr(transformers, name)
        model, report = auto_class.from_pretrained(
            source.source,
            config=model_config,
            use_safetensors=True,
            ignore_mismatched_sizes=has_head,
            output_loading_info=True,
            **source.options,
            **loading_options(
                config.model.quantize,
                config.model.dtype,
                model_config,
                auto_class.from_config,
                config.method.modules_to_save,
            ),
        )
    mismatched = [key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]]
    return model, sorted({*report["missing_keys"], *mismatched})
