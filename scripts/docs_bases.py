"""The table of docs/bases.md, from the rows that the tests wrote (tests/bases_record.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from weft.methods import METHODS

RECORDS = Path(__file__).resolve().parent.parent / "docs" / "records" / "bases"
# In this order; a file that is not listed comes after these.
ORDER = ("packed", "experts", "conv", "host")
MARK = {"exact": "yes", "refused": "no", "not tried": "–"}


def rows() -> list[dict[str, Any]]:
    """Returns the rows of all records."""
    files = sorted(
        RECORDS.glob("*.json"),
        key=lambda f: (ORDER.index(f.stem) if f.stem in ORDER else len(ORDER), f.stem),
    )
    return [row for file in files for row in json.loads(file.read_text(encoding="utf-8"))]


def bases_block() -> str:
    """One line per kind of base, one column per method, the reasons of what is refused below."""
    found = rows()
    if not found:
        return "Not tried yet.\n"
    methods = [m for m in METHODS if any(row["method"] == m for row in found)]
    methods += list(dict.fromkeys(r["method"] for r in found if r["method"] not in METHODS))
    reasons: dict[str, int] = {}
    lines = []
    for base in dict.fromkeys(row["base"] for row in found):
        mine = {row["method"]: row for row in found if row["base"] == base}
        first = next(iter(mine.values()))
        needs = next((f" (needs {row['needs']})" for row in mine.values() if row["needs"]), "")
        cells = [_cell(mine.get(method), reasons) for method in methods]
        lines.append((base + needs, f"{first['library']} {first['version']}".strip(), *cells))
    head = ("base", "package", *methods)
    text = "".join(
        "| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |\n"
        for line in (head, ["---"] * len(head), *lines)
    )
    notes = "".join(f"{number}. {reason}.\n" for reason, number in reasons.items())
    return text + (f"\n{notes}" if notes else "")


def _cell(row: dict[str, Any] | None, reasons: dict[str, int]) -> str:
    if row is None:
        return MARK["not tried"]
    if not row["reason"]:
        return MARK[row["verdict"]]
    number = reasons.setdefault(row["reason"].rstrip("."), len(reasons) + 1)
    return f"{MARK[row['verdict']]} ({number})"
