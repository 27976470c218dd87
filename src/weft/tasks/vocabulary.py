"""The tokens and the positions that a model has, against those that its tokenizer gives it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from ..errors import WeftError


def words_of(config: Any) -> int | None:
    """Returns the number of token embeddings of a model with this configuration, or None if the
    configuration does not say.
    """
    found = getattr(_text_config(config), "vocab_size", None)
    return int(found) if isinstance(found, int) and found > 0 else None


def max_positions(config: Any, model: nn.Module | None = None) -> int | None:
    """Returns the number of positions of a model with this configuration, or None if it has no
    limit. With the model, on any device, its learned tables count too.
    """
    text = _text_config(config)
    named = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    learned = None if model is None else learned_positions(model)
    return min((int(n) for n in (named, learned) if n), default=None)


def learned_positions(model: nn.Module) -> int | None:
    """Returns how many tokens fit into the shortest table of learned positions, or None without
    one.

    The tables of a vision-language model's image tower are of patches, and do not count. A table
    whose first rows are reserved takes fewer tokens than it has rows: RoBERTa counts its positions
    from padding_idx + 1, and BART and OPT skip `offset` rows.
    """
    found = []
    for name, module in _text_part(model).named_modules():
        last = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and ("position" in last or last == "wpe"):
            reserved = getattr(module, "offset", 0)
            if module.padding_idx is not None:
                reserved = max(reserved, module.padding_idx + 1)
            found.append(module.num_embeddings - reserved)
    return min((n for n in found if n > 0), default=None)


def padding(tokenizer: Any, config: Any) -> tuple[int, str | None]:
    """Returns the id that fills rows, and a note if it is not the tokenizer's pad token.

    It is the first of pad token, end-of-text token and 0 for which the model has an embedding.
    """
    words, pad, eos = words_of(config), tokenizer.pad_token_id, tokenizer.eos_token_id
    if pad is not None and (words is None or pad < words):
        return int(pad), None
    fill = int(eos) if eos is not None and (words is None or eos < words) else 0
    why = (
        "The tokenizer has no pad token"
        if pad is None
        else f"The tokenizer's pad token is {pad}, and the model has {words} embeddings"
    )
    return fill, f"{why}; rows are padded with token {fill}, which is masked."


def use_padding(config: Any, pad: int) -> None:
    """Writes the id that fills rows into a model's configuration, where classifiers without a
    token of their own for the whole text (GPT-2, Llama) look for the last token of a row.
    """
    for each in {id(c): c for c in (config, _text_config(config))}.values():
        each.pad_token_id = pad


def check_ids(rows: Iterable[Sequence[int]], tokenizer: Any, config: Any, what: str) -> None:
    """Raises WeftError if a row has a token for which the model has no embedding.

    `what` names the rows, for example "training, sample"; the number of the row follows.
    """
    words = words_of(config)
    if words is None:
        return
    for number, ids in enumerate(rows, 1):
        if len(ids) and max(ids) >= words:
            worst = max(ids)
            token = tokenizer.convert_ids_to_tokens(int(worst))
            raise WeftError(
                f"{what} {number}: token {token!r} has the id {worst}, and the model has "
                f"{words} embeddings (the tokenizer has {len(tokenizer)} tokens). Give the model's "
                "own tokenizer, or a model that was resized for this one: "
                f"model.resize_token_embeddings({len(tokenizer)})."
            )


def _text_part(model: nn.Module) -> nn.Module:
    """The part of a model that reads text."""
    config = getattr(model, "config", None)
    if config is None or _text_config(config) is config or not hasattr(model, "get_decoder"):
        return model
    part: Any = model.get_decoder()  # type: ignore[operator]
    return part if isinstance(part, nn.Module) else model


def _text_config(config: Any) -> Any:
    """The part of a configuration that is about text."""
    inner = getattr(config, "get_text_config", None)
    return config if inner is None else inner()
