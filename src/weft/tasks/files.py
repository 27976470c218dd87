"""Reads text lines, CSV and TSV, JSON and JSONL, and parquet; .gz is decompressed.

Rows are dictionaries of a file's columns. The name alone decides the format, not the content.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError, WeftError

FORMATS = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
Row = dict[str, Any]
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def read_text(path: Path) -> str:
    """Returns the whole file with line feeds as line ends and without a byte order mark. Raises
    WeftError if it is not UTF-8 or no valid gzip file.
    """
    try:
        held = path.read_bytes()
        text = (gzip.decompress(held) if path.suffix == ".gz" else held).decode("utf-8-sig")
    except OSError as error:
        if isinstance(error, gzip.BadGzipFile):
            raise WeftError(f"{path} ends in .gz but is not a gzip file: {error}") from None
        raise WeftError(f"{path} cannot be read: {error.strerror}.") from None
    except (UnicodeDecodeError, EOFError, zlib.error) as error:
        raise WeftError(f"{path} cannot be read as UTF-8 text: {error}") from None
    return text.replace("\r\n", "\n")


def read_lines(path: Path) -> list[str]:
    """Returns one stripped string per line, with empty lines. The last line needs no line end. Only
    a line feed ends a line.
    """
    lines = read_text(path).split("\n")
    if lines[-1] == "":
        lines.pop()
    return [line.strip() for line in lines]


def table(path: Path, header: Sequence[str] = ()) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Returns header and rows, each with its line number. A .tsv is split at tabs and never
    unquoted.

    `header` has the columns of a file without a header. Raises WeftError if csv cannot parse the
    file.
    """
    stream = io.StringIO(read_text(path), newline="")
    tabs = ".tsv" in path.suffixes
    reader = (
        csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE) if tabs else csv.reader(stream)
    )
    try:
        rows = [(reader.line_num, row) for row in reader if row]
    except csv.Error as error:
        raise WeftError(f"{path}, line {reader.line_num}: {error}") from None
    if header:
        return list(header), rows
    return ([name.strip() for name in rows[0][1]], rows[1:]) if rows else ([], [])


def is_table(path: Path) -> bool:
    """Returns True if the name's ending is that of a format with named columns; any other file has
    lines of text.
    """
    return format_of(path) in FORMATS


def format_of(path: Path) -> str:
    """Returns the ending without .gz, or ""."""
    return next((s for s in reversed(path.suffixes) if s != ".gz"), "")


def read_rows(path: Path, header: Sequence[str] = ()) -> list[Row]:
    """Returns all rows of a table in the format of its name. Raises WeftError with the invalid
    line.
    """
    kind = format_of(path)
    if kind not in FORMATS:
        raise WeftError(
            f"{path}: the name must end in one of {', '.join(FORMATS)} (.gz may follow)."
        )
    if kind == ".parquet":
        rows = _parquet(path)
    elif kind in (".json", ".jsonl"):
        rows = _json(path, kind)
    else:
        names, listed = table(path, header)
        wrong = next((line for line, row in listed if len(row) != len(names)), None)
        if wrong is not None:
            raise WeftError(
                f"{path}, line {wrong}: the number of fields is not {len(names)}, as in the "
                f"header {names}."
            )
        rows = [dict(zip(names, row, strict=True)) for _, row in listed]
    if not rows:
        raise WeftError(f"{path}: it has no rows.")
    return rows


def _json(path: Path, kind: str) -> list[Row]:
    """A list of objects (.json), or one object per line (.jsonl, and a .json with lines of
    objects).
    """
    text = read_text(path)
    if kind == ".json":
        try:
            held = json.loads(text)
        except (ValueError, RecursionError) as error:
            if "\n" not in text.strip() or not text.lstrip().startswith("{"):
                at = error.lineno if isinstance(error, json.JSONDecodeError) else 1
                raise WeftError(f"{path}, line {at}: {_why_no_json(error)}.") from None
        else:
            held = held if isinstance(held, list) else [held]
            return [_object(path, f"entry {i}", row) for i, row in enumerate(held, start=1)]
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append(_object(path, f"line {number}", json.loads(line)))
        except (ValueError, RecursionError) as error:
            raise WeftError(f"{path}, line {number}: {_why_no_json(error)}.") from None
    return rows


def _why_no_json(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return error.msg
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return f"a number is too long ({str(error).partition(':')[0]})"


def _object(path: Path, where: str, value: Any) -> Row:
    if not isinstance(value, dict):
        raise WeftError(f"{path}, {where}: {str(value)[:40]!r} is not an object with named fields.")
    return value


def _parquet(path: Path) -> list[Row]:
    from pyarrow import ArrowInvalid, parquet

    try:
        rows: list[Row] = parquet.read_table(path).to_pylist()
    except (ArrowInvalid, OSError) as error:
        raise WeftError(f"{path} cannot be read as parquet: {str(error).splitlines()[0]}") from None
    return rows


def columns(rows: Sequence[Row], where: str, *names: str) -> None:
    """Checks that every row has these fields. Raises WeftError with the row, its missing fields and
    its fields.
    """
    for number, row in enumerate(rows, start=1):
        missing = [name for name in names if row.get(name) is None]
        if missing:
            raise WeftError(
                f"{where}, row {number}: {missing} is missing; it has {sorted(map(str, row))}."
            )


def find_file(place: Path, names: Sequence[str]) -> Path | None:
    """Returns the first of `names` in a folder, in any format and with or without .gz, or None."""
    for name in names:
        for ending in ("", *FORMATS, ".txt"):
            for packed in ("", ".gz"):
                path = place / f"{name}{ending}{packed}"
                if path.is_file():
                    return path
    return None


def find_splits(place: Path, names: Mapping[str, Sequence[str]], what: str) -> dict[str, Path]:
    """Returns the file of every split in a folder. Raises WeftError if there is none."""
    found = {
        split: path
        for split, stems in names.items()
        if (path := find_file(place, stems)) is not None
    }
    if not found:
        stems = [stem for group in names.values() for stem in group]
        have = sorted(p.name for p in place.iterdir())[:8]
        raise WeftError(
            f"{what}: {place} has none of {', '.join(stems)} (with {', '.join(FORMATS)} or .txt, "
            ".gz or "
            f"not). It has {have}."
        )
    return found


def is_hub_name(text: str) -> bool:
    """Returns True for a hub name. A name that looks like a path is never looked up
    on the network.
    """
    local = (
        text.startswith((".", "/", "~")) or text.endswith("/") or Path(text).expanduser().exists()
    )
    return not local and _HUB_NAME.fullmatch(text) is not None


def hub_rows(name: str, config: str | None, split: str) -> list[Row] | None:
    """Returns the rows of a split of a data set on the hub, or None if it has no such split.

    Needs the package `datasets`. Raises WeftError if there is no network or no such data set.
    """
    try:
        import datasets
    except ImportError:
        raise ConfigError(
            f"dataset {name!r}: reading from the hub needs `datasets`: pip install 'weft[tasks]'."
        ) from None
    try:
        held = datasets.load_dataset(name, config)
    except Exception as error:  # OSError, ValueError, and errors of datasets and the hub
        first = next(
            (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
        )
        raise WeftError(
            f"dataset {name!r} is not a local folder and could not be loaded from the hub: {first}"
        ) from None
    return [dict(row) for row in held[split]] if split in held else None
