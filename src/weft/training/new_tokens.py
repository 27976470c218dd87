"""`model.new_tokens`: tokens that a run adds to the tokenizer, whose rows train beside the method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..checkpoint.tokenizer_files import tokenizer_folder
from ..errors import ConfigError
from ..tasks.models import ModelRef, loading, quiet
from ..tasks.vocabulary import words_of
from .config.sections import RunConfig
from .start import Start

TOKENIZER = "tokenizer"  # in place of a list: the tokens for which the model has no embedding


@dataclass(frozen=True)
class NewTokens:
    """The ids of the tokens, and the number of embeddings that the model needs for them."""

    ids: tuple[int, ...] = ()
    words: int = 0


def add_new_tokens(
    config: RunConfig, tokenizer: Any, model_config: Any, notes: list[str]
) -> NewTokens:
    """Adds the tokens to the tokenizer, and the number of embeddings to the model's configuration.

    Raises ConfigError if there are none, or if the method names other ones.
    """
    given, words = config.model.new_tokens, words_of(model_config)
    if given is None:
        return NewTokens()
    if words is None:
        raise ConfigError("model.new_tokens: this model has no token embeddings.")
    if config.method.new_tokens:
        raise ConfigError(
            "model.new_tokens sets method.new_tokens, which is given too. Give one: tokens as text "
            "there, ids here."
        )
    ids = range(words, len(tokenizer)) if given == TOKENIZER else _added(given, tokenizer, notes)
    if not ids:
        raise ConfigError(
            f"model.new_tokens=tokenizer: the model has {words} embeddings, and the tokenizer "
            f"{len(tokenizer)} tokens, so there is none to train. Name the tokens to add."
        )
    found = NewTokens(tuple(sorted(ids)), max(words, len(tokenizer), *(i + 1 for i in ids)))
    notes.append(
        f"{len(found.ids)} new tokens, ids {found.ids[0]} to {found.ids[-1]}: their rows train"
        + (
            f"; the model is resized from {words} to {found.words} embeddings, the new ones at the "
            "mean of the others."
            if found.words > words
            else "."
        )
    )
    model_config.get_text_config().vocab_size = found.words
    return found


def check_start(start: Start, tokenizer: Any, new: NewTokens) -> None:
    """Raises ConfigError if an id of the new tokens means another token in adapter.start."""
    from transformers import AutoTokenizer

    folder = tokenizer_folder(start.path)
    ids = sorted({*new.ids, *(n for each in start.stored.token_ids.values() for n in each)})
    if not ids or folder is None:
        return
    ref = ModelRef(start.path, str(folder), True)
    with quiet(), loading(ref, "a tokenizer"):
        theirs = AutoTokenizer.from_pretrained(ref.source, **ref.options)
    for number in ids:
        there, here = (each.convert_ids_to_tokens(number) for each in (theirs, tokenizer))
        if there != here:
            raise ConfigError(
                f"adapter.start={start.path!r}: token {number} is {there!r} there and {here!r} in "
                "this run. Give model.new_tokens in the same order."
            )


def _added(tokens: tuple[str, ...], tokenizer: Any, notes: list[str]) -> list[int]:
    known = tokenizer.get_vocab()
    there = [token for token in tokens if token in known]
    if there:
        notes.append(f"In the tokenizer already, so their present rows train: {there}.")
    tokenizer.add_tokens([token for token in tokens if token not in known])
    return [int(number) for number in tokenizer.convert_tokens_to_ids(list(tokens))]
