"""Reads text lines, CSV and TSV, JSON and JSONL, and parquet; .gz is decompressed.

Rows are dictionaries of a file's columns. The name alone decides the format, not the content.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError, WeftError
from ..untrusted import json_text
from .decoding import read_text
from .tables import check_names, check_unquoted, is_tsv, table

FORMATS = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
Row = dict[str, Any]
Numbered = tuple[str, Row]  # "line 7", and the row
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def read_lines(path: Path) -> list[str]:
    """Returns one stripped string per line, with empty lines. The last line needs no line end. Only
    a line feed ends a line.
    """
    lines = read_text(path).split("\n")
    if lines[-1] == "":
        lines.pop()
    return [line.strip() for line in lines]


def is_table(path: Path) -> bool:
    """Returns True if the name's ending is that of a format with named columns; any other file has
    lines of text.
    """
    return format_of(path) in FORMATS


def format_of(path: Path) -> str:
    """Returns the ending without .gz, or ""."""
    endings = [suffix.lower() for suffix in path.suffixes]
    return next((s for s in reversed(endings) if s != ".gz"), "")


def read_rows(path: Path, header: Sequence[str] = ()) -> list[Row]:
    """Returns all rows of a table in the format of its name. Raises WeftError with the invalid
    line.
    """
    return [row for _, row in numbered_rows(path, header)]


def numbered_rows(path: Path, header: Sequence[str] = (), plain: bool = False) -> list[Numbered]:
    """Returns all rows of a table, each with its place in the file for messages ("line 7").

    `plain`: nothing is known of the file, so a .tsv that was written with quotes is refused. Raises
    WeftError as `read_rows`.
    """
    kind = format_of(path)
    if kind not in FORMATS:
        raise WeftError(
            f"{path}: the name must end in one of {', '.join(FORMATS)} (.gz may follow)."
        )
    if kind == ".parquet":
        rows = [(f"row {i}", row) for i, row in enumerate(_parquet(path), 1)]
    elif kind in (".json", ".jsonl"):
        rows = _json(path, kind)
    else:
        rows = _table(path, header, plain)
    if not rows:
        raise WeftError(f"{path}: it has no rows.")
    return rows


def _table(path: Path, header: Sequence[str], plain: bool) -> list[Numbered]:
    names, listed = table(path, header)
    _check_separator(path, names if not header else ())
    wrong = next((line for line, row in listed if len(row) != len(names)), None)
    if wrong is not None:
        raise WeftError(
            f"{path}, line {wrong}: the number of fields is not {len(names)}, as in the "
            f"header {names}."
        )
    if plain:
        check_unquoted(path, names, listed)
    return [(f"line {line}", dict(zip(names, row, strict=True))) for line, row in listed]


def _check_separator(path: Path, names: Sequence[str]) -> None:
    """Raises WeftError if the header is one cell that names several columns."""
    own, known = ("tab", "\t") if is_tsv(path) else ("comma", ","), {",", ";", "\t", "|"}
    found = next((s for s in sorted(known - {own[1]}) if len(names) == 1 and s in names[0]), None)
    if found is not None:
        raise WeftError(
            f"{path}: its header is one column, {names[0]!r}, so the cells seem to be separated by "
            f"{found!r}. A {'.tsv' if is_tsv(path) else '.csv'} is separated by a {own[0]}: write it "
            f"so, or as .jsonl{' (.tsv is separated by tabs)' if found == chr(9) else ''}."
        )


def _json(path: Path, kind: str) -> list[Numbered]:
    """A list of objects (.json), or one object per line (.jsonl, and a .json with lines of
    objects).
    """
    text = read_text(path)
    if kind == ".json" and not _has_lines(text):
        held = _parsed(text, path, 0)
        held = held if isinstance(held, list) else [held]
        return [_json_row(path, f"entry {i}", row) for i, row in enumerate(held, start=1)]
    return [
        _json_row(path, f"line {number}", _parsed(line, path, number))
        for number, line in enumerate(text.split("\n"), start=1)
        if line.strip()
    ]


def _has_lines(text: str) -> bool:
    """Whether the text is one object per line: its first line is an object, and more follows."""
    first, _, rest = text.lstrip().partition("\n")
    if not first.startswith("{") or not rest.strip():
        return False
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return False
    return True


def _parsed(text: str, path: Path, line: int) -> Any:
    """The value of a JSON text. `line` is the line that it is, or 0 for a whole file."""
    try:
        return json_text.loads(text)
    except json.JSONDecodeError as error:
        raise WeftError(f"{path}, line {line or error.lineno}: {error.msg}.") from None
    except ValueError as error:
        where = f"{path}, line {line}" if line else f"{path}"
        raise WeftError(f"{where}: {error}.") from None


def _json_row(path: Path, where: str, value: Any) -> Numbered:
    if not isinstance(value, dict):
        raise WeftError(f"{path}, {where}: {str(value)[:40]!r} is not an object with named fields.")
    return where, value


def _parquet(path: Path) -> list[Row]:
    from pyarrow import ArrowException, parquet

    try:
        names = parquet.read_schema(path).names
        rows: list[Row] = (
            parquet.read_table(path).to_pylist() if len(set(names)) == len(names) else []
        )
    except (ArrowException, OSError, ValueError) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise WeftError(f"{path} cannot be read as parquet: {first}") from None
    check_names(names, str(path))
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


def saved_rows(path: Path, split: str) -> list[Row] | None:
    """Returns the rows of a data set that `datasets` saved to disk, or of one of its splits; None
    if it has splits, and none of that name. Raises WeftError.
    """
    try:
        import datasets
    except ImportError:
        raise ConfigError(
            f"{path} was saved by `datasets`, which reads it: pip install 'weft[tasks]'."
        ) from None
    try:
        held = datasets.load_from_disk(str(path))
        if isinstance(held, datasets.DatasetDict):
            if split not in held:
                return None
            held = held[split]
        return [dict(row) for row in held]
    except Exception as error:  # OSError, ValueError, and errors of datasets and pyarrow
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise WeftError(f"{path} cannot be read as a saved data set: {first}") from None
