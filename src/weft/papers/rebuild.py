"""Recomputes each row: the real method on the real architecture, with its trained
tensors counted.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

from torch import nn

from .. import methods
from ..errors import WeftError
from ..model.adapter import Adapter
from ..model.attach import attach_noted
from ..model.detach import detach
from ..model.structure import Structure, base_parameters, within
from .architectures import ARCHITECTURES, Architecture
from .figures import figure
from .tables import NOTHING, PrintedRow, PrintedTable

STATUSES = ("reproduced", "explained", "different")


class NotAvailable(Exception):
    """The table has a method that this version of Weft does not have."""


@dataclass(frozen=True)
class Count:
    """Trained parameters without the output head, those of the head, and bytes: of the tensors, of
    the file.
    """

    body: int
    head: int
    added: int
    values: int
    file: int | None


@dataclass(frozen=True)
class Result:
    """A row and its result. `computed` is in the row's unit, `trained` in parameters; None if
    nothing is printed.

    `why` is how a reproduced figure was rounded, or why it differs. `remark` is about the
    architecture.
    """

    table: PrintedTable
    row: PrintedRow
    computed: float | None
    status: str
    why: str
    difference: float | None = None
    trained: int | None = None
    storage: Count | None = None
    remark: str = ""

    @property
    def reason(self) -> str:
        """The reason, the note and the remark on one line."""
        return "; ".join(filter(None, (self.why, self.row.note, self.remark)))

    def to_json(self) -> dict[str, Any]:
        """Returns JSON values."""
        return {
            "id": self.row.id,
            "table": self.table.title,
            "row": self.row.row,
            "printed": self.row.printed,
            "computed": self.computed,
            "status": self.status,
            "reason": self.reason,
        }


def rebuild(tables: Iterable[PrintedTable]) -> list[Result]:
    """Returns the result of every row. Each architecture is built once, and each configuration
    attached once.
    """
    models: dict[Architecture, Model] = {}
    return [_result(table, row, models) for table in tables for row in table.rows]


def configurations(row: PrintedRow) -> list[Any]:
    """Returns the configurations of a row. Raises NotAvailable if the library has no
    such method.
    """
    for data in row.methods:
        if data["method"] not in methods.METHODS:
            raise NotAvailable(f"method not available: weft.{data['method']}")
    return [methods.from_json(data) for data in row.methods]


class Model:
    """One architecture on the meta device, shared by all its rows."""

    def __init__(self, architecture: Architecture) -> None:
        self.root: nn.Module = architecture.on_meta()
        self.remark = architecture.remark
        self._counts: dict[str, Count] = {}

    @cached_property
    def heads(self) -> set[str]:
        """Tensors of the output head; a head tied to the embedding is none."""
        structure = Structure.of(self.root)
        return {name for name in structure.parameters if within(name, structure.head)}

    def size(self, beside: Sequence[str] = ()) -> int:
        """Returns the number of parameters, without modules whose name has one of these parts."""
        return sum(
            p.numel()
            for name, p in base_parameters(self.root)
            if not set(beside) & set(name.split("."))
        )

    def count(self, row: PrintedRow) -> Count:
        """Returns the trained parameters of a row. Raises NotAvailable if the library has no such
        method.
        """
        configs = configurations(row)
        key = json.dumps([row.methods, row.unit == "bytes"], sort_keys=True)
        if key not in self._counts:
            with ExitStack() as attached:
                adapters = []
                for i, config in enumerate(configs):
                    name = f"papers{i}"
                    adapters.append(attach_noted(self.root, config, name))
                    attached.callback(detach, self.root, name)
                self._counts[key] = self._counted(adapters, row.unit == "bytes")
        return self._counts[key]

    def _counted(self, adapters: Sequence[Adapter], file: bool) -> Count:
        sums = {"body": 0, "head": 0, "added": 0, "values": 0}
        for in_head, is_added, numbers, nbytes in self._trained(adapters):
            sums["head" if in_head else "body"] += numbers
            sums["added"] += numbers if is_added else 0
            sums["values"] += nbytes
        return Count(**sums, file=sum(a.nbytes for a in adapters) if file else None)

    def _trained(self, adapters: Sequence[Adapter]) -> Iterator[tuple[bool, bool, int, int]]:
        """Per trained tensor, each once: is it part of the head, is it missing in the base,
        parameters, bytes.
        """
        seen: set[int] = set()
        for adapter in adapters:
            for name, p in adapter.named_parameters():
                selected = adapter.selected_tensors.get(name)
                identity = id(p if selected is None else selected.original)
                if identity not in seen:
                    seen.add(identity)
                    yield (
                        selected is not None and within(name, list(self.heads)),
                        selected is None,
                        p.numel(),
                        p.numel() * p.element_size(),
                    )


def _result(table: PrintedTable, row: PrintedRow, models: dict[Architecture, Model]) -> Result:
    if row.model is None:
        return Result(table, row, None, "explained", row.reason)
    architecture = ARCHITECTURES[row.model]
    if architecture not in models:
        models[architecture] = Model(architecture)
    model = models[architecture]
    try:
        count = model.count(row)
    except (NotAvailable, WeftError) as error:
        return Result(table, row, None, "different", str(error))
    if row.printed == NOTHING:
        return Result(table, row, None, "explained", row.reason.format(head=count.head))
    return _compared(table, row, count, model)


def _compared(table: PrintedTable, row: PrintedRow, count: Count, model: Model) -> Result:
    """The count compared with the printed figure."""
    trained = count.body + (count.head if row.head else 0)
    exact = {
        "numbers": Fraction(trained),
        "bytes": Fraction(count.values),
        "percent": Fraction(100 * trained, model.size(row.beside) + count.added),
    }[row.unit]
    printed = figure(row.printed, row.unit)
    computed, difference = _rounded(exact, row.unit), _rounded(exact - printed.value, row.unit)
    reading = printed.reading(exact)
    if reading is not None:
        status, why = "reproduced", reading
    elif row.reason and computed == row.ours:
        status, why = "explained", row.reason
    else:
        status, why = "different", _unexplained(row)
    return Result(
        table,
        row,
        computed,
        status,
        why,
        difference,
        trained,
        count if row.unit == "bytes" else None,
        model.remark,
    )


def _rounded(number: Fraction, unit: str) -> float:
    """A percentage with six decimals, anything else as a whole number."""
    return round(float(number), 6) if unit == "percent" else round(number)


def _unexplained(row: PrintedRow) -> str:
    if row.ours is None:
        return "neither rounding nor truncation gives the printed figure, and no reason is known"
    return f"the known reason is about a count of {row.ours:,}"
