"""Matches the rows of new tokens in a checkpoint with a model's embeddings and heads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import TargetError
from ..methods.token_spec import by_module
from ..model.structure.tokens import TokenTable, token_tables
from .problems import fault_of, nearest


def plan(into: Any) -> None:
    """Fills `tokens` of a LoadPlan, by the first module that reads a table, and adds a problem for
    every table and every tensor without a counterpart. `new_tokens` gets the model's names.
    """
    checkpoint, problems = into.checkpoint, into.problems
    names = into.names.found
    spec = {
        name if name is None else names.get(name, name): ids
        for name, ids in by_module(into.config.new_tokens).items()
    }
    into.config = replace(into.config, new_tokens=spec.get(None, spec) if spec else ())
    try:
        tables = token_tables(into.structure, into.config)
    except TargetError as error:
        problems.append(str(error))
        into.config = replace(into.config, new_tokens=())
        return
    into.tables = tables
    for module, rows in checkpoint.tokens.items():
        table = next((t for t in tables if names.get(module) in t.readers), None)
        if table is None:
            problems.append(
                f"extra: rows of new tokens of {module!r}, which the model does not have as a table of "
                f"tokens{nearest('in the model', module, [t.name for t in tables], problems)}"
            )
            continue
        fault = fault_of(rows, (len(table.ids), _width(table)))
        if fault is not None:
            problems.append(f"the rows of new tokens of {module!r}: {fault}")
        elif table.name in into.tokens and not torch.equal(into.tokens[table.name], rows):
            problems.append(
                f"the rows of new tokens of {module!r} differ in the file from those of another "
                "module, and are one tied table in the model"
            )
        else:
            into.tokens[table.name] = rows
    problems += [
        f"missing: the file has no rows for the new tokens of {table.name!r}, which the model has as "
        "a table of its own"
        for table in tables
        if table.name not in into.tokens and not _tried(into, table)
    ]


def same_table(into: Any, full: str, live: Tensor, table: Tensor) -> bool:
    """Whether a table of the file's base [tokens, width] is the model's, `live`, but for the rows
    that the file replaces, and for those behind its last token, which fill the table up.
    """
    ids = into.checkpoint.token_ids.get(full.removesuffix(".weight"))
    live = live.detach().cpu()
    if not ids or live.shape != table.shape or not live.is_floating_point():
        return False
    kept = torch.arange(len(table))
    kept = kept[(kept <= ids[-1]) & ~torch.isin(kept, torch.tensor(ids))]
    here, there = live[kept], table[kept]
    return torch.equal(here.to(there.dtype), there) or torch.equal(here, there.to(here.dtype))


def _tried(into: Any, table: TokenTable) -> bool:
    """Whether the file has rows for the table that do not fit."""
    return any(into.names.found.get(module) in table.readers for module in into.checkpoint.tokens)


def _width(table: TokenTable) -> int:
    layer = table.readers[table.name]
    return layer.out_features if layer.takes_ids else layer.in_features
