"""The rebuilt rows as text of 80 columns, table by table as the papers have them, and as JSON."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from .formulas import FORMS
from .rebuild import STATUSES, Result

WIDTH = 80
_LABEL = 26
_HEADS = {
    "numbers": "trained numbers",
    "percent": "percent of all numbers, what was added included",
}


def as_json(results: Sequence[Result]) -> dict[str, Any]:
    """`storage`: for the rows that print bytes, those of the trained tensors and those of the file
    that Weft writes.
    """
    storage = [
        {"id": r.row.id, "values": r.storage.values, "file": r.storage.file}
        for r in results
        if r.storage
    ]
    return {"schema": 1, "rows": [r.to_json() for r in results], "storage": storage}


def as_text(results: Sequence[Result], forms: bool = True) -> str:
    """All tables; `forms` adds the closed form of each method. The last line has the numbers of
    rows by status.
    """
    lines: list[str] = []
    for table in dict.fromkeys(r.table for r in results):
        rows = [r for r in results if r.table is table]
        lines += [*_table(rows), *_storage(rows), ""]
    if forms:
        lines += [*_forms(), ""]
    lines += [
        "reproduced: our count, rounded to the printed digits, or cut where it says so",
        "explained: another count, and the reason for it is known",
        "",
    ]
    found = Counter(r.status for r in results)
    lines.append(
        f"{len(results)} rows: " + ", ".join(f"{found[status]} {status}" for status in STATUSES)
    )
    return "\n".join(lines)


def _table(rows: Sequence[Result]) -> Iterator[str]:
    table = rows[0].table
    yield from textwrap.wrap(f"[{table.name}] {table.title}", WIDTH, subsequent_indent="  ")
    yield f"  {_HEADS.get(rows[0].row.unit, _HEADS['numbers'])}"
    for remark in dict.fromkeys(r.remark for r in rows if r.remark):
        of = ", ".join(
            dict.fromkeys(r.row.model for r in rows if r.remark == remark and r.row.model)
        )
        yield from _indented(f"{of}: {remark}")
    yield _line("row", "printed", "ours", "difference", "status")
    for r in rows:
        yield from _labelled(
            r.row.row, r.row.printed, _number(r.computed), _number(r.difference, sign="+"), r.status
        )
        if r.status != "reproduced":
            yield from _indented(r.why)
        said = "; ".join(
            filter(None, ("printed truncated" if r.why == "truncated" else "", r.row.note))
        )
        if said:
            yield from _indented(said)


def _storage(rows: Sequence[Result]) -> Iterator[str]:
    """What Weft writes where the paper prints bytes."""
    stored = [r for r in rows if r.storage]
    if not stored:
        return
    yield "  adapter_model.safetensors as Weft writes it, header and all, in bytes"
    yield _line("row", "printed", "file", "beyond", "")
    for r in stored:
        if r.storage and r.storage.file is not None:
            beyond = r.storage.file - r.storage.values
            yield from _labelled(
                r.row.row, r.row.printed, _number(r.storage.file), _number(beyond, sign="+"), ""
            )


def _forms() -> Iterator[str]:
    yield "Closed forms (the tests hold them equal to the attached methods)"
    yield from _indented(
        "an adapted map is (out, in); L blocks of width d with MLP width f, V tokens, c positions; "
        "Full, "
        "BitFit and TopLayers as of a GPT-2"
    )
    for name, form in FORMS.items():
        yield from textwrap.wrap(f"  {name:<11} {form.text}", WIDTH, subsequent_indent=" " * 14)


def _labelled(label: str, *cells: str) -> Iterator[str]:
    """A line; a label that is too long goes on below it."""
    first, *more = textwrap.wrap(label, _LABEL)
    yield _line(first, *cells)
    yield from (f"    {part}" for part in more)


def _line(label: str, printed: str, ours: str, difference: str, status: str) -> str:
    return f"  {label:<{_LABEL}} {printed:>10} {ours:>15} {difference:>12} {status}".rstrip()


def _indented(text: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent="      ", subsequent_indent="      ", break_on_hyphens=False
    )


def _number(value: float | None, sign: str = "") -> str:
    if value is None:
        return ""
    return f"{value:{sign},}" if isinstance(value, int) else f"{value:{sign}.4f}"
