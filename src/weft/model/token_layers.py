"""The layers that train the rows of new tokens, beside those of the method: see
methods/token_rows.py.

They are adapted layers like the others, so `weft.use`, rows of mixed batches, copies and detaching
need nothing of their own. The modules that read one table share one Parameter.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch

from ..errors import TargetError
from ..methods.config import DTYPES
from ..methods.rng import Rng
from ..methods.token_rows import TokenRows
from .layer import AdapterLayer
from .plan_entries import Frozen
from .selected import Selected
from .structure.tokens import TokenTable

ROWS = "rows"


def build(tables: Collection[TokenTable], config: Any) -> dict[str, AdapterLayer]:
    """Returns one layer per module that reads a table, by name."""
    found: dict[str, AdapterLayer] = {}
    for table in tables:
        first: AdapterLayer | None = None
        asked = DTYPES[getattr(config, "dtype", "float32")]  # a selection of base tensors has none
        wide = torch.promote_types(asked, table.parameter.dtype)
        name_of = str(wide).removeprefix("torch.")
        for name, base in table.readers.items():
            method = TokenRows(ids=table.ids, of_ids=base.takes_ids, dtype=name_of)
            layer = AdapterLayer(method, base, None)
            layer.initialise(Rng(0, name, base.device))
            ids = torch.tensor(table.ids, device=base.device)
            layer.register_buffer("ids", ids, persistent=False)
            if first is not None:
                layer.register_parameter(ROWS, first.get_parameter(ROWS))
            layer.train(base.module.training)
            found[name] = first = layer
    return found


def check(
    tables: Collection[TokenTable], adapted: Collection[str], selected: Mapping[str, Selected]
) -> None:
    """Raises TargetError if the method adapts or trains a whole table whose rows are to train."""
    whole = {id(s.original): name for name, s in selected.items()}
    for table in tables:
        other = whole.get(id(table.parameter))
        if other is not None:
            raise TargetError(
                f"new_tokens: {other!r} is trained in full, so all its rows train. Leave new_tokens "
                "out, or take the tensor out of the others."
            )
        for name in table.readers:
            if name in adapted:
                raise TargetError(
                    f"{name!r} is named by targets and by new_tokens: a layer is adapted, or its "
                    "new rows are trained. Take it out of one of the two."
                )


def noted(tables: Collection[TokenTable], frozen: list[Frozen]) -> list[Frozen]:
    """Returns the plan's entries of frozen layers, with those whose new rows train marked."""
    rows = {name: len(table.ids) for table in tables for name in table.readers}
    return [
        replace(f, reason=f"{f.reason}, beside the {rows[f.name]} rows of new tokens")
        if f.name in rows
        else f
        for f in frozen
    ]
