"""peft's `trainable_token_indices`, both ways: the rows of new tokens beside LoRA and AdaLoRA.

    trainable_token_indices: {"model.embed_tokens": [50257, 50258]}, or a list for the input embedding
    base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta  [n, width]

Despite the name the tensor holds the rows themselves, in the order of the ids. Of tied modules the file
has one. If the vocabulary was resized, peft also writes the whole tables of the base, with the rows of
a head that is not tied, whose new rows then are the file's too:
    ...model.embed_tokens.token_adapter.base_layer.weight      ...lm_head.weight      [tokens, width]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError
from ...methods.token_spec import normalise
from ..checkpoint import Checkpoint

FIELD = "trainable_token_indices"
_SUFFIX = ".token_adapter.trainable_tokens_delta"
_TABLE = ".token_adapter.base_layer.weight"


def rows_key(module: str) -> str:
    """Returns the key, without prefix, of the rows of a module's new tokens."""
    return f"{module}{_SUFFIX}"


def field(checkpoint: Checkpoint) -> dict[str, Any]:
    """Returns the field of the configuration, if there are new tokens."""
    if not checkpoint.tokens:
        return {}
    return {FIELD: {module: list(checkpoint.token_ids[module]) for module in checkpoint.tokens}}


def why_none(checkpoint: Checkpoint) -> str | None:
    """Returns why a format without this field cannot hold the checkpoint, or None."""
    first = next(iter(checkpoint.tokens), None)
    return None if first is None else f"there is no form for rows of new tokens, like {first!r}'s"


def take_tokens(checkpoint: Checkpoint, rest: dict[str, Tensor], config: Mapping[str, Any]) -> None:
    """Moves the rows [n, width] out of `rest`, in ascending order of their ids, and writes them as
    `new_tokens`. Raises ConfigError if the field is no list or object of ids.
    """
    given = config.get(FIELD)
    modules = [key.removesuffix(_SUFFIX) for key in rest if key.endswith(_SUFFIX)]
    if not given:
        return
    if not isinstance(given, Mapping | list):
        raise ConfigError(f"{FIELD}={given!r}: a list of ids, or ids by module, is expected.")
    asked: dict[str, list[int]] = {}
    named = given if isinstance(given, Mapping) else dict.fromkeys(modules, given)
    for ending, ids in named.items():
        normalise(FIELD, ids)
        asked |= dict.fromkeys([m for m in modules if m.endswith(ending)] or [ending], ids)
    if not asked:
        checkpoint.problems.append(f"missing: {FIELD} is set, and no {rows_key('*')!r} is there")
    _take_tables(checkpoint, rest, asked)
    for module in [m for m in modules if m in asked]:
        rows, ids = rest.pop(rows_key(module)), asked[module]
        if rows.ndim != 2 or len(rows) != len(ids):
            checkpoint.problems.append(
                f"{rows_key(module)!r}: shape {list(rows.shape)} in the file, {len(ids)} rows expected"
            )
            continue
        checkpoint.tokens[module] = rows[torch.tensor(ids).argsort()]
        checkpoint.token_ids[module] = tuple(sorted(ids))
    asked |= {m: list(ids) for m, ids in checkpoint.token_ids.items()}
    spec = {module: tuple(sorted(ids)) for module, ids in asked.items()}
    checkpoint.config = replace(checkpoint.config, new_tokens=spec)


def _take_tables(
    checkpoint: Checkpoint, rest: dict[str, Tensor], asked: Mapping[str, list[int]]
) -> None:
    """Moves whole tables of the base [tokens, width] out of `rest`, and takes the new rows of those
    that have no others.
    """
    sizes = set()
    for key in [key for key in rest if key.endswith(_TABLE)]:
        module = key.removesuffix(_TABLE)
        table = checkpoint.repeated[f"{module}.weight"] = rest.pop(key)
        sizes.add(tuple(table.shape))
        checkpoint.token_counts[module] = len(table)
    ids = sorted({number for found in asked.values() for number in found})
    for key in [key for key in rest if key.endswith(".weight")]:
        module, table = key.removesuffix(".weight"), rest[key]
        if module in checkpoint.sites or tuple(table.shape) not in sizes or ids[-1] >= len(table):
            continue
        checkpoint.repeated[key] = rest.pop(key)
        checkpoint.tokens[module] = table[torch.tensor(ids)]
        checkpoint.token_ids[module] = tuple(ids)
        checkpoint.token_counts[module] = len(table)
