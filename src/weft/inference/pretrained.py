"""A `transformers` model by name: its architecture without weights, or loaded for an adapter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.tokenizer_files import has_tokenizer
from ..errors import ConfigError, WeftError
from ..tasks.models import ModelRef, find_model, loading, quiet
from ..tasks.quantize import loading_options
from ..untrusted import json_text
from .dummy_inputs import dummy_inputs

__all__ = [
    "base_for",
    "dummy_inputs",
    "empty_model",
    "find_source",
    "find_tokenizer",
    "grow_embeddings",
    "is_classifier",
]

# Rows that a vocabulary may have beyond its tokens: it is rounded up to a multiple.
SPARE = 4096


def find_source(name: str) -> ModelRef:
    """Returns the model with this name: an embedded one, a directory, a config.json, or one on the
    hub. Raises ConfigError.
    """
    path = Path(name).expanduser()
    if path.is_file() and path.suffix == ".json":
        return ModelRef(name, str(path), True)
    return find_model(name)


def find_tokenizer(name: str, key: str) -> ModelRef:
    """Returns the tokenizer with this name: a directory with the files of a tokenizer, whether or
    not there is a model beside it, or what a model may be. `key` gave the name. Raises ConfigError.
    """
    path = Path(name).expanduser()
    if not path.is_dir():
        try:
            return find_source(name)
        except ConfigError:
            raise ConfigError(
                f"{key}={name!r}: there is no such tokenizer. Give a directory with the files of "
                "one, as save_pretrained writes them, or a hub name."
            ) from None
    if not has_tokenizer(path) and not (path / "config.json").is_file():
        raise ConfigError(
            f"{key}={name!r}: this directory has no tokenizer (tokenizer_config.json and "
            f"tokenizer.json, as save_pretrained writes them). It has "
            f"{sorted(p.name for p in path.iterdir())[:6]}."
        )
    return ModelRef(name, str(path), True)


def empty_model(ref: ModelRef, task_class: str | None = None) -> nn.Module:
    """Returns the architecture on the meta device, from the configuration alone. Raises
    WeftError.
    """
    with quiet(), loading(ref, "a configuration"):
        config = configuration(ref)
        cls = _class_of(config, task_class)
        with torch.device("meta"):
            model = _made(cls, config)
    return model.eval()


def _made(cls: Any, config: Any) -> nn.Module:
    """A model of a class, or of what an Auto class chooses."""
    made: nn.Module = cls(config) if hasattr(cls, "base_model_prefix") else cls.from_config(config)
    return made


def base_for(
    ref: ModelRef,
    task_class: str | None,
    selected: Mapping[str, Tensor],
    dtype: str = "auto",
    words: int = 0,
    trained: int = 0,
    quantize: str | None = None,
) -> tuple[nn.Module, list[str]]:
    """Loads the pretrained model for an adapter of a `task_class` that has its own values of the
    base tensors `selected` [...], with `words` token embeddings if it has fewer, of which the
    adapter has `trained`. `quantize`: a name of `tasks.quantize.QUANTIZE`.

    Returns the model, and the names of its tensors that are not in its checkpoint. The number of
    classes of a new head is that of `selected`. Raises WeftError if weights are neither in the
    checkpoint nor in `selected`, since they would be random.
    """
    head = _head_size(ref, task_class, selected)
    with quiet(), loading(ref, task_class or "a model"):
        config = configuration(ref, **head)
        cls = _class_of(config, task_class)
        whole = {n.removesuffix(".weight") for n in selected if n.endswith(".weight")}
        model, report = cls.from_pretrained(
            ref.source,
            config=config,
            use_safetensors=True,
            ignore_mismatched_sizes=bool(head),
            output_loading_info=True,
            **ref.options,
            **loading_options(quantize, dtype, config, partial(_made, cls), whole),
        )
    missing = {
        *report["missing_keys"],
        *(key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]),
    }
    _check_random(ref, missing - set(selected))
    base: nn.Module = grow_embeddings(model, words, trained).eval()
    return base, sorted(missing)


@torch.no_grad()
def grow_embeddings(model: Any, words: int, trained: int) -> nn.Module:
    """Returns the model with at least `words` token embeddings. New rows, also of a head, are the
    mean of the old ones, so they are the same in every process.

    trained: how many rows an adapter has. Raises WeftError if most of the new ones would not be
    its own, as for an adapter of another model.
    """
    before = model.get_input_embeddings().weight.shape[0] if words else 0
    if words > before + trained + SPARE:
        raise WeftError(
            f"the adapter needs {words} token embeddings and has {trained} of them, and this model "
            f"has {before}. Give the model that it was trained on."
        )
    if before < words:
        model.resize_token_embeddings(words, mean_resizing=False)
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            if module is not None:
                rows = module.weight
                rows[before:] = rows[:before].double().mean(0).to(rows.dtype)
    found: nn.Module = model
    return found


def configuration(ref: ModelRef, **changes: Any) -> Any:
    """Returns a model's configuration with these changes."""
    import transformers

    path = Path(ref.source)
    if path.is_file():
        data = json_text.loads(path.read_text(encoding="utf-8"))
        return transformers.AutoConfig.for_model(**{**data, **changes})
    return transformers.AutoConfig.from_pretrained(ref.source, **ref.options, **changes)


def _class_of(config: Any, task_class: str | None) -> Any:
    """The adapter's class, else that of the configuration, else a causal language model, else the
    model without a head.
    """
    import transformers

    for name in (task_class, *(config.architectures or ())):
        found = getattr(transformers, name, None) if name else None
        if found is not None and getattr(found, "config_class", None) is type(config):
            return found
    causal = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    return causal.get(type(config), transformers.AutoModel)


def _head_size(
    ref: ModelRef, task_class: str | None, selected: Mapping[str, Tensor]
) -> dict[str, int]:
    """num_labels, if the adapter's tensors have another number of rows than the configuration."""
    shapes = {name: p.shape for name, p in empty_model(ref, task_class).named_parameters()}
    rows = {
        value.shape[0]
        for name, value in selected.items()
        if name in shapes
        and value.ndim
        and shapes[name][1:] == value.shape[1:]
        and shapes[name] != value.shape
    }
    return {"num_labels": rows.pop()} if len(rows) == 1 else {}


def _check_random(ref: ModelRef, names: Iterable[str]) -> None:
    loose = sorted(names)
    if loose:
        more = f" and {len(loose) - 1} more" if len(loose) > 1 else ""
        raise WeftError(
            f"model {ref.name!r} has no weights for {loose[0]!r}{more}, and the adapter does not "
            "bring them; they would be random. Give the model that the adapter was trained on."
        )


def is_classifier(model: nn.Module) -> bool:
    """Whether a model gives one output per text, which decoders read at the last token of a row."""
    return "SequenceClassification" in type(model).__name__
