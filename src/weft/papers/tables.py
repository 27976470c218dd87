"""Reads tables.json, the papers' tables: the printed values of each row, and its method and model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import resources
from typing import Any

from ..errors import ConfigError

SCHEMA = 1
NOTHING = "-"  # printed if a row has no figure


@dataclass(frozen=True)
class PrintedRow:
    """One printed figure.

    `methods` are configurations in JSON, each attached under its own name; a tensor trained by two
    of them counts once. `head`: parameters of the output head count too. `beside`: modules that the
    percentage does not count as part of the whole. `reason` is why a figure is not reproduced, and
    `ours` the count for which that is true. `note` is about a reproduced one.
    """

    id: str
    row: str
    printed: str
    unit: str
    model: str | None = None
    methods: tuple[dict[str, Any], ...] = ()
    head: bool = False
    beside: tuple[str, ...] = ()
    ours: float | None = None
    reason: str = ""
    note: str = ""


@dataclass(frozen=True, eq=False)
class PrintedTable:
    """`name` is the argument of --table, `title` names the paper's table."""

    name: str
    title: str
    rows: tuple[PrintedRow, ...]


def tables() -> list[PrintedTable]:
    """Returns all tables in the order of the papers. Raises ConfigError if tables.json has another
    schema.
    """
    text = resources.files(__package__).joinpath("tables.json").read_text(encoding="utf-8")
    data = json.loads(text)
    if data["schema"] != SCHEMA:
        raise ConfigError(
            f"tables.json has schema {data['schema']}; this Weft reads schema {SCHEMA}."
        )
    return [
        PrintedTable(t["name"], t["title"], tuple(_printed_row(r, t["unit"]) for r in t["rows"]))
        for t in data["tables"]
    ]


def find_table(name: str, among: Sequence[PrintedTable]) -> PrintedTable:
    """Returns the table of this name or title, case-insensitive. Raises ConfigError with the
    nearest names.
    """
    by_name = {key.lower(): table for table in among for key in (table.name, table.title)}
    if name.lower() in by_name:
        return by_name[name.lower()]
    near = get_close_matches(name.lower(), by_name, n=2, cutoff=0.4)
    names = list(dict.fromkeys(by_name[key].name for key in near)) or [
        table.name for table in among
    ]
    raise ConfigError(f"--table {name!r} is not known. Nearest: {', '.join(names)}.")


def _printed_row(data: dict[str, Any], unit: str) -> PrintedRow:
    given = dict(data)
    given["methods"] = tuple(given.pop("method", ()))
    given["beside"] = tuple(given.get("beside", ()))
    return PrintedRow(**{"unit": unit, **given})
