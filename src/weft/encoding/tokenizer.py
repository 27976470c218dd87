"""A model's tokenizer, how many tokens it takes, and the tokens that end generation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from ..tasks.models import ModelRef
from ..tasks.vocabulary import max_positions


def tokenizer_and_stops(model: ModelRef, tokenizer: ModelRef) -> tuple[Any, Any, set[int]]:
    """Returns the tokenizer, the model's configuration, and the ids at which its generation
    stops.
    """
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    loaded = AutoTokenizer.from_pretrained(tokenizer.source, **tokenizer.options)
    config = AutoConfig.from_pretrained(model.source, **model.options)
    stops = [getattr(config, "eos_token_id", None)]
    if not model.local or (Path(model.source) / "generation_config.json").is_file():
        generation = GenerationConfig.from_pretrained(model.source, local_files_only=model.local)
        stops.append(generation.eos_token_id)
    ids = {
        i
        for stop in stops
        for i in (stop if isinstance(stop, list) else [stop])
        if isinstance(i, int)
    }
    return loaded, config, ids


def max_tokens(tokenizer: Any, config: Any, model: nn.Module | None = None) -> int:
    """Returns how many tokens both the tokenizer and the model accept; see `max_positions`."""
    positions = max_positions(config, model)
    return int(min(tokenizer.model_max_length, positions or tokenizer.model_max_length))


def unknown_token(tokenizer: Any) -> int | None:
    """Returns the id for what the tokenizer does not know, None if it has none of its own."""
    unknown = tokenizer.unk_token_id
    other = (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id)
    return None if unknown in other else unknown
