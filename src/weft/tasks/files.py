"""Reading the files in which people have data: lines, CSV and TSV, JSON and JSONL, parquet; .gz is
unpacked.

Rows are dictionaries of a file's own columns. Nothing is guessed from content: the name says the
format.
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
    """The whole file, line feeds as line ends, without a byte order mark. Raises WeftError: not
    UTF-8, no gzip.
    """
    try:
        held = path.read_bytes()
        text = (gzip.decompress(held) if path.suffix == ".gz" else held).decode("utf-8-sig")
    except OSError as error:
        if isinstance(error, gzip.BadGzipFile):
            raise WeftError(f"{path} is named .gz and is no gzip file: {error}") from None
        raise WeftError(f"{path} cannot be read: {error.strerror}.") from None
    except (UnicodeDecodeError, EOFError, zlib.error) as error:
        raise WeftError(f"{path} cannot be read as UTF-8 text: {error}") from None
    return text.replace("\r\n", "\n")


def read_lines(path: Path) -> list[str]:
    """One stripped string a line, empty lines kept; the last line needs no line end. Only a line
    feed ends a line.
    """
    lines = read_text(path).split("\n")
    if lines[-1] == "":
        lines.pop()
    return [line.strip() for line in lines]


def table(path: Path, header: Sequence[str] = ()) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Header and rows, each with the number of its line. A .tsv is split at tabs and never
    unquoted.

    header: the columns of a file that has no header of its own. Raises WeftError: what csv refuses.
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
    """The name ends as that of rows with named columns does; any other file is lines of text."""
    return format_of(path) in FORMATS


def format_of(path: Path) -> str:
    """The ending without .gz, "" where there is none."""
    return next((s for s in reversed(path.suffixes) if s != ".gz"), "")


def read_rows(path: Path, header: Sequence[str] = ()) -> list[Row]:
    """All rows of a table, by the format that the name says. Raises WeftError with the line at
    fault.
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
                f"{path}, line {wrong}: the number of fields is not {len(names)}, as the header "
                f"{names} wants."
            )
        rows = [dict(zip(names, row, strict=True)) for _, row in listed]
    if not rows:
        raise WeftError(f"{path}: there are no rows in it.")
    return rows


def _json(path: Path, kind: str) -> list[Row]:
    """A list of objects (.json), or an object a line (.jsonl). A .json that holds lines of objects
    is read so too.
    """
    text = read_text(path)
    if kind == ".json":
        try:
            held = json.loads(text)
        except json.JSONDecodeError as error:
            if "\n" not in text.strip() or not text.lstrip().startswith("{"):
                raise WeftError(f"{path}, line {error.lineno}: {error.msg}.") from None
        else:
            held = held if isinstance(held, list) else [held]
            return [_object(path, f"entry {i}", row) for i, row in enumerate(held, start=1)]
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append(_object(path, f"line {number}", json.loads(line)))
        except json.JSONDecodeError as error:
            raise WeftError(f"{path}, line {number}: {error.msg}.") from None
    return rows


def _object(path: Path, where: str, value: Any) -> Row:
    if not isinstance(value, dict):
        raise WeftError(f"{path}, {where}: {str(value)[:40]!r} is no object with named fields.")
    return value


def _parquet(path: Path) -> list[Row]:
    from pyarrow import ArrowInvalid, parquet

    try:
        rows: list[Row] = parquet.read_table(path).to_pylist()
    except (ArrowInvalid, OSError) as error:
        raise WeftError(f"{path} cannot be read as parquet: {str(error).splitlines()[0]}") from None
    return rows


def columns(rows: Sequence[Row], where: str, *names: str) -> None:
    """Check that every row has these fields. Raises WeftError naming the row, what it lacks and
    what it has.
    """
    for number, row in enumerate(rows, start=1):
        missing = [name for name in names if row.get(name) is None]
        if missing:
            raise WeftError(
                f"{where}, row {number}: {missing} must be there; it has {sorted(map(str, row))}."
            )


def find_file(place: Path, names: Sequence[str]) -> Path | None:
    """The first of `names` in a folder, with any of the formats and with or without .gz; None where
    there is none.
    """
    for name in names:
        for ending in ("", *FORMATS, ".txt"):
            for packed in ("", ".gz"):
                path = place / f"{name}{ending}{packed}"
                if path.is_file():
                    return path
    return None


def find_splits(place: Path, names: Mapping[str, Sequence[str]], what: str) -> dict[str, Path]:
    """The file of every split that a folder holds. Raises WeftError: none of them is there."""
    found = {
        split: path
        for split, stems in names.items()
        if (path := find_file(place, stems)) is not None
    }
    if not found:
        stems = [stem for group in names.values() for stem in group]
        have = sorted(p.name for p in place.iterdir())[:8]
        raise WeftError(
            f"{what}: {place} holds none of {', '.join(stems)} (with {', '.join(FORMATS)} or .txt, "
            ".gz or "
            f"not). It holds {have}."
        )
    return found


def is_hub_name(text: str) -> bool:
    """What looks like a path is never sought on the network."""
    local = (
        text.startswith((".", "/", "~")) or text.endswith("/") or Path(text).expanduser().exists()
    )
    return not local and _HUB_NAME.fullmatch(text) is not None


def hub_rows(name: str, config: str | None, split: str) -> list[Row] | None:
    """The rows of a split of a dataset on the hub, by the package `datasets`; None where it has no
    such split.

    Raises WeftError with one line: no network, no such dataset.
    """
    try:
        import datasets
    except ImportError:
        raise ConfigError(
            f"dataset {name!r}: reading from the hub needs `datasets`: pip install 'weft[tasks]'."
        ) from None
    try:
        held = datasets.load_dataset(name, config)
    except Exception as error:  # datasets raises OSError, ValueError, its own, and the hub's
        first = next(
            (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
        )
        raise WeftError(
            f"dataset {name!r} is nothing here, and could not be loaded from the hub: {first}"
        ) from None
    return [dict(row) for row in held[split]] if split in held else None
