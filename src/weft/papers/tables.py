"""The papers' tables as they lie in tables.json: what each row prints, and which method on which
model it speaks of.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import resources
from typing import Any

from ..errors import ConfigError

SCHEMA = 1
NOTHING = "-"  # printed where a table has a row and no figure


@dataclass(frozen=True)
class Row:
    """One printed figure.

    `methods`: configurations in JSON, each attached under a name of its own; a tensor that two of
    them train counts once. `head`: the output head's numbers count too. `beside`: modules that the
    percentage leaves out of the whole. `reason`: why a figure does not reproduce, and `ours` the
    count of which that is true. `note`: on one that does.
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
class Table:
    """`name` is what --table takes, `title` says which table of which paper."""

    name: str
    title: str
    rows: tuple[Row, ...]


def tables() -> list[Table]:
    """All of them, in the order of the papers."""
    text = resources.files(__package__).joinpath("tables.json").read_text(encoding="utf-8")
    data = json.loads(text)
    if data["schema"] != SCHEMA:
        raise ConfigError(
            f"tables.json has schema {data['schema']}; this Weft reads schema {SCHEMA}."
        )
    return [
        Table(t["name"], t["title"], tuple(_row(r, t["unit"]) for r in t["rows"]))
        for t in data["tables"]
    ]


def find(name: str, among: Sequence[Table]) -> Table:
    """A table by its name or title, in any case. Raises ConfigError with the nearest."""
    by_name = {key.lower(): table for table in among for key in (table.name, table.title)}
    if name.lower() in by_name:
        return by_name[name.lower()]
    near = get_close_matches(name.lower(), by_name, n=2, cutoff=0.4)
    names = list(dict.fromkeys(by_name[key].name for key in near)) or [
        table.name for table in among
    ]
    raise ConfigError(f"--table {name!r} is not known. Nearest: {', '.join(names)}.")


def _row(data: dict[str, Any], unit: str) -> Row:
    given = dict(data)
    given["methods"] = tuple(given.pop("method", ()))
    given["beside"] = tuple(given.get("beside", ()))
    return Row(**{"unit": unit, **given})
