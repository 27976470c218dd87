"""Tables as text: .csv with quotes, .tsv without.

The names of the columns are taken without the blanks around them, and none may stand twice. What
Python's reader takes in silence is an error: a quote in the middle of a cell, and one that is never
closed, which would swallow the rest of the file.
"""

from __future__ import annotations

import csv
import io
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..errors import WeftError
from .decoding import read_text

LARGEST_CELL = 2**31 - 1  # characters; Python's own limit is 131,072, and a C long may have 32 bits
Rows = list[tuple[int, list[str]]]
_lock = threading.Lock()


def table(path: Path, header: Sequence[str] = ()) -> tuple[list[str], Rows]:
    """Returns header and rows, each with its line number. A .tsv is split at tabs and never
    unquoted.

    `header` has the columns of a file without a header. Raises WeftError if the file cannot be
    parsed, or if a column's name is given twice.
    """
    stream = io.StringIO(read_text(path), newline="")
    tabs = is_tsv(path)
    reader = (
        csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)
        if tabs
        else csv.reader(stream, strict=True)
    )
    try:
        with _large_cells():
            rows = [(reader.line_num, row) for row in reader if row]
    except csv.Error as error:
        raise WeftError(
            f"{path}, line {reader.line_num}: {error}. In a .csv, a cell with a quote is written in "
            'quotes, and the quote twice: "a ""b"" c".'
        ) from None
    if header or not rows:
        return list(header), rows
    names = [name.strip() for name in rows[0][1]]
    check_names(names, f"{path}, line {rows[0][0]}")
    return names, rows[1:]


def is_tsv(path: Path) -> bool:
    """Returns True if the name is that of a table split at tabs."""
    return ".tsv" in (suffix.lower() for suffix in path.suffixes)


def check_names(names: Sequence[str], where: str) -> None:
    """Raises WeftError if two columns have one name: a row could have only one of them."""
    twice = next((name for name in names if list(names).count(name) > 1), None)
    if twice is not None:
        places = [str(i) for i, name in enumerate(names, 1) if name == twice]
        raise WeftError(
            f"{where}: the columns {' and '.join(places)} are both called {twice!r}. Rename or "
            "remove one."
        )


def check_unquoted(path: Path, names: Sequence[str], rows: Rows) -> None:
    """Raises WeftError if a .tsv was written with quotes, which would become a part of the text.

    A cell in quotes is text like any other; but not if all cells of a column are, or if the quotes
    within it are doubled.
    """
    if not is_tsv(path):
        return
    for place, name in enumerate(names):
        cells = [(line, row[place]) for line, row in rows if place < len(row)]
        quoted = [(line, cell[1:-1]) for line, cell in cells if _in_quotes(cell)]
        doubled = [
            line for line, inner in quoted if '""' in inner and '"' not in inner.replace('""', "")
        ]
        if quoted and (doubled or len(quoted) == len(cells)):
            line = doubled[0] if doubled else quoted[0][0]
            raise WeftError(
                f"{path}, line {line}, column {name!r}: the cell is in quotes, and a .tsv is never "
                "unquoted, so they would be a part of the text. Write the file without quotes, or "
                "as .csv or .jsonl."
            )


def _in_quotes(cell: str) -> bool:
    return len(cell) > 1 and cell.startswith('"') and cell.endswith('"')


@contextmanager
def _large_cells() -> Iterator[None]:
    """Raises the csv module's limit for the time of a read. It is one for all threads."""
    with _lock:
        before = csv.field_size_limit(LARGEST_CELL)
        try:
            yield
        finally:
            csv.field_size_limit(before)
