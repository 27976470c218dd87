"""The results as text of 80 columns, table by table as in the papers, and as JSON."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from ..untrusted.printable import WIDTH
from .formulas import FORMS
from .rebuild import STATUSES, Result

_LABEL = 26
_HEADS = {
    "numbers": "trained parameters",
    "percent": "percent of all parameters, added ones included",
}


def papers_json(results: Sequence[Result]) -> dict[str, Any]:
    """Returns JSON values. `storage` has, for rows that print bytes, those of the trained tensors
    and of the file.
    """
    storage = [
        {"id": r.row.id, "values": r.storage.values, "file": r.storage.file}
        for r in results
        if r.storage
    ]
    return {"schema": 1, "rows": [r.to_json() for r in results], "storage": storage}


def papers_text(results: Sequence[Result], forms: bool = True) -> str:
    """Returns all tables; `forms` adds the closed form of each method. The last line counts the
    rows by status.
    """
    lines: list[str] = []
    for table in dict.fromkeys(r.table for r in results):
        rows = [r for r in results if r.table is table]
        lines += [*_table_lines(rows), *_storage(rows), ""]
    if forms:
        lines += [*_forms(), ""]
    lines += [
        "reproduced: our count, rounded to the printed digits, or truncated if noted",
        "explained: another count, for a known reason",
        "",
    ]
    counts = Counter(r.status for r in results)
    lines.append(
        f"{len(results)} rows: " + ", ".join(f"{counts[status]} {status}" for status in STATUSES)
    )
    return "\n".join(lines)


def _table_lines(rows: Sequence[Result]) -> Iterator[str]:
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
        yield from _labelled_line(
            r.row.row,
            r.row.printed,
            _count_text(r.computed),
            _count_text(r.difference, sign="+"),
            r.status,
        )
        if r.status != "reproduced":
            yield from _indented(r.why)
        remarks = "; ".join(
            filter(None, ("printed truncated" if r.why == "truncated" else "", r.row.note))
        )
        if remarks:
            yield from _indented(remarks)


def _storage(rows: Sequence[Result]) -> Iterator[str]:
    """The size of Weft's file, if the paper prints bytes."""
    stored = [r for r in rows if r.storage]
    if not stored:
        return
    yield "  adapter_model.safetensors as written by Weft, with its header, in bytes"
    yield _line("row", "printed", "file", "beyond", "")
    for r in stored:
        if r.storage and r.storage.file is not None:
            beyond = r.storage.file - r.storage.values
            yield from _labelled_line(
                r.row.row,
                r.row.printed,
                _count_text(r.storage.file),
                _count_text(beyond, sign="+"),
                "",
            )


def _forms() -> Iterator[str]:
    yield "Closed forms (the tests check that they equal the attached methods)"
    yield from _indented(
        "an adapted matrix is (out, in); L blocks of width d with MLP width f, V tokens, c "
        "positions; Full, BitFit and TopLayers are those of a GPT-2"
    )
    for name, form in FORMS.items():
        yield from textwrap.wrap(f"  {name:<11} {form.text}", WIDTH, subsequent_indent=" " * 14)


def _labelled_line(label: str, *cells: str) -> Iterator[str]:
    """One line; a long label continues below it."""
    first, *more = textwrap.wrap(label, _LABEL)
    yield _line(first, *cells)
    yield from (f"    {part}" for part in more)


def _line(label: str, printed: str, ours: str, difference: str, status: str) -> str:
    return f"  {label:<{_LABEL}} {printed:>10} {ours:>15} {difference:>12} {status}".rstrip()


def _indented(text: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent="      ", subsequent_indent="      ", break_on_hyphens=False
    )


def _count_text(value: float | None, sign: str = "") -> str:
    if value is None:
        return ""
    return f"{value:{sign},}" if isinstance(value, int) else f"{value:{sign}.4f}"
