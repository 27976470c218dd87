"""A model's tokenizer, how many tokens it takes, and the tokens that end generation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..tasks.models import ModelRef, loading
from ..tasks.vocabulary import max_positions


def tokenizer_and_stops(
    model: ModelRef, tokenizer: ModelRef, what: str = "tokenizer"
) -> tuple[Any, Any, set[int]]:
    """Returns the tokenizer, the model's configuration, and the ids at which its generation
    stops. `what` errors call the tokenizer, if it is not the model's.
    """
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    with loading(tokenizer, "a tokenizer", "model" if tokenizer == model else what):
        loaded = AutoTokenizer.from_pretrained(tokenizer.source, **tokenizer.options)
    config = AutoConfig.from_pretrained(model.source, **model.options)
    stops = [getattr(c, "eos_token_id", None) for c in (config, config.get_text_config())]
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


def has_unknown(tokenizer: Any, ids: Sequence[int], texts: Iterable[str]) -> bool:
    """Whether the tokens of these texts have the token for what the tokenizer does not know, more
    often than the texts have it themselves: SmolLM2's is its ordinary `<|endoftext|>`, which a
    template may print.
    """
    unknown = tokenizer.unk_token_id
    other = (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id)
    if unknown is None or unknown in other:
        return False
    found = list(ids).count(unknown)
    return found > 0 and found > sum(text.count(tokenizer.unk_token) for text in texts)


def special_start(tokenizer: Any) -> list[int]:
    """Returns the tokens that the tokenizer puts before a text: a bos token, or nothing."""
    whole, bare = (
        list(tokenizer("a")["input_ids"]),
        list(tokenizer("a", add_special_tokens=False)["input_ids"]),
    )
    return next((whole[:i] for i in range(len(whole)) if whole[i : i + len(bare)] == bare), [])
