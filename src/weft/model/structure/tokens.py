"""The embeddings and heads whose rows of new tokens train: `new_tokens` of a configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from torch import nn

from ...errors import TargetError
from ...methods.config import Config
from ...methods.token_spec import Ids, by_module
from ..base_layers import BaseLayer, kind_of, weight_fault
from ..offload import offloads
from ..packings import packing_of
from .names import canonical, ends_in
from .structure import Structure


@dataclass(frozen=True)
class TokenTable:
    """A weight with one row per token, the modules that read it, by name, and the trained rows."""

    parameter: nn.Parameter
    readers: Mapping[str, BaseLayer]
    ids: Ids

    @property
    def name(self) -> str:
        """The first module that reads it."""
        return next(iter(self.readers))


def token_tables(structure: Structure, config: Config) -> list[TokenTable]:
    """Returns the tables that `new_tokens` names, each once, in the model's order.

    Raises TargetError if a module is not found, or is no embedding or head that Weft knows; if an
    id has no row; and if two names of one tied table have different ids.
    """
    named: dict[str, Ids] = {}
    for ending, ids in by_module(config.new_tokens).items():
        found = _embeddings(structure, config) if ending is None else _ending_in(structure, ending)
        for name in found:
            if named.setdefault(name, ids) != ids:
                raise TargetError(f"new_tokens: two entries name {name!r}, with different ids.")
    tables: dict[int, TokenTable] = {}
    for name in structure.modules:
        if name in named:
            _add(structure, tables, name, named[name])
    return list(tables.values())


def _add(structure: Structure, tables: dict[int, TokenTable], name: str, ids: Ids) -> None:
    parameter = _weight(structure, name)
    known = tables.get(id(parameter))
    if known is not None:
        if known.ids != ids:
            raise TargetError(
                f"new_tokens: {known.name!r} and {name!r} are tied, and have different ids. Give "
                "both the same, or name one."
            )
        return
    readers = {
        other: _reader(structure, other, tensor)
        for full, p in structure.readers.items()
        if p is parameter
        for other, _, tensor in [full.rpartition(".")]
        if other in structure.modules  # else it is a module under its second name
    }
    rows = parameter.shape[0] if _by_row(next(iter(readers.values()))) else parameter.shape[1]
    if ids[-1] >= rows:
        raise TargetError(
            f"new_tokens: {name!r} has {rows} rows, and none for the id {ids[-1]}. Resize the model "
            "first, after adding the tokens to the tokenizer: "
            "model.resize_token_embeddings(len(tokenizer))."
        )
    tables[id(parameter)] = TokenTable(parameter, readers, ids)


def _by_row(layer: BaseLayer) -> bool:
    """Whether the stored weight has one row per token, as all but a Conv1D have."""
    return layer.takes_ids or not layer.transposed


def _weight(structure: Structure, name: str) -> nn.Parameter:
    weight = structure.modules[name]._parameters.get("weight")
    if weight is None:
        raise TargetError(f"new_tokens: {name!r} has no weight parameter of its own.")
    return weight


def _reader(structure: Structure, name: str, tensor: str) -> BaseLayer:
    """The view of a module that reads a table. Raises TargetError if its rows cannot be replaced."""
    module = structure.modules[name]
    kind = kind_of(module)
    why = weight_fault(module) if kind is not None else None
    if kind is None or not kind.has_weight or tensor != "weight":
        why = "it is neither an embedding nor a linear layer"
    elif packing_of(module) is not None:
        why = "its weight is quantised"
    elif getattr(module, "max_norm", None) is not None:
        why = "max_norm rewrites its weight in every forward"
    elif offloads(module):
        why = "accelerate keeps its weight elsewhere between two calls"
    if kind is None or why is not None:
        raise TargetError(
            f"new_tokens: the rows that {name!r} ({type(module).__name__}) reads cannot be "
            f"trained: {why}."
        )
    return kind(module)


def _ending_in(structure: Structure, ending: str) -> list[str]:
    found = [
        name
        for name, module in structure.modules.items()
        if (ends_in(name, ending) or ends_in(canonical(name), ending))
        and (isinstance(module, nn.Embedding) or kind_of(module) is not None)
    ]
    if not found:
        have = sorted({n.rpartition(".")[2] for n in structure.layers if n})
        near = get_close_matches(ending.rpartition(".")[2], have, n=3) or have[:8]
        raise TargetError(
            f"new_tokens={{{ending!r}: ...}} names no embedding or linear layer. Nearest: {near}."
        )
    return found


def _embeddings(structure: Structure, config: Config) -> Sequence[str]:
    """The input embedding and, if it has one row per token, the output head."""
    root = structure.root
    table = _accessor(root, "get_input_embeddings")
    found = [name for name, module in structure.modules.items() if module is table]
    if table is None:
        found = [n for n, module in structure.modules.items() if isinstance(module, nn.Embedding)]
    if len(found) != 1:
        raise TargetError(
            f"new_tokens={list(config.new_tokens)[:4]}: which of the embeddings {found} of "
            f"{type(root).__name__} is that of the tokens? Give ids by module: "
            f'new_tokens={{"{(found or ["embed"])[0]}": [...]}}.'
        )
    words = _weight(structure, found[0])
    output = _accessor(root, "get_output_embeddings")
    heads = [n for n, m in structure.modules.items() if m is output] if output else structure.head
    for name in heads:
        weight = structure.modules[name]._parameters.get("weight")
        if weight is not None and weight is not words and weight.shape[:1] == words.shape[:1]:
            found.append(name)
    return found


def _accessor(root: nn.Module, name: str) -> Any:
    """The module that a method of transformers returns, or None."""
    method = getattr(root, name, None)
    try:
        found = method() if callable(method) else None
    except (NotImplementedError, AttributeError):  # raised by transformers if a model has none
        return None
    return found if isinstance(found, nn.Module) else None
