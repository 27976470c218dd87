"""Files of outputs and references whose rows belong together by an id, in the authors' formats."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ...errors import WeftError
from ...untrusted import json_text
from ..decoding import read_text
from ..files import format_of, numbered_rows

V = TypeVar("V")
Row = Mapping[str, Any]


def read_json(path: Path) -> Any:
    """Returns the value of a JSON file (.gz too), or a list of one value per line if it has JSON
    lines.

    Raises WeftError with the line that is no JSON.
    """
    text = read_text(path)
    try:
        return json_text.loads(text)
    except json.JSONDecodeError as error:
        if not error.msg.startswith("Extra data"):
            raise WeftError(f"{path}, line {error.lineno}: no JSON ({error.msg}).") from None
    except ValueError as error:
        raise WeftError(f"{path}: {error}.") from None
    return [_line(path, n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]


def _line(path: Path, number: int, line: str) -> Any:
    try:
        return json_text.loads(line)
    except ValueError as error:
        raise WeftError(f"{path}, line {number}: no JSON ({error}).") from None


def rows(path: Path, within: Sequence[str] = ()) -> list[Row]:
    """Returns the objects of a table (.csv, .tsv), of JSON lines, or of a JSON list; `within` names
    the keys under which the authors' files have the list. Raises WeftError.
    """
    if format_of(path) in (".csv", ".tsv"):
        return [row for _, row in numbered_rows(path)]
    value = read_json(path)
    if isinstance(value, dict):
        key = next((k for k in within if isinstance(value.get(k), list)), None)
        value = [value] if key is None else value[key]
    for number, row in enumerate(value if isinstance(value, list) else [value], 1):
        if not isinstance(row, dict):
            raise WeftError(
                f"{path}, entry {number}: {json_text.shortened(row)} is not an object with named "
                "fields."
            )
    return list(value)


def value_of(path: Path, number: int, row: Row, names: Sequence[str]) -> Any:
    """Returns the first of these fields that a row has. Raises WeftError that names the row."""
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise WeftError(
        f"{path}, entry {number} has no {' or '.join(repr(n) for n in names)}; its fields are "
        f"{', '.join(map(str, row)) or 'none'}."
    )


def by_id(
    path: Path, listed: Iterable[Row], ids: Sequence[str], fields: Sequence[str]
) -> dict[str, Any]:
    """Returns the value of a row's first field in `fields` by its id. Raises WeftError if a row has
    neither, or an id is given twice.
    """
    found: dict[str, Any] = {}
    for number, row in enumerate(listed, 1):
        name = str(value_of(path, number, row, ids))
        if name in found:
            raise WeftError(f"{path}, entry {number}: the id {name!r} is given twice.")
        found[name] = value_of(path, number, row, fields)
    return found


def matched(
    references: Path, wanted: Mapping[str, V], outputs: Path, found: Mapping[str, Any]
) -> list[str]:
    """Returns the ids in the references' order. Raises WeftError if one of the files has ids that
    the other has not, or there is none.
    """
    if not wanted:
        raise WeftError(f"{references}: the file has nothing to score.")
    missing = [name for name in wanted if name not in found]
    unknown = [name for name in found if name not in wanted]
    if missing:
        raise WeftError(
            f"{outputs} has no output for {len(missing)} of the {len(wanted)} ids in {references}, "
            f"{missing[0]!r} first. Each needs one; an empty text counts as wrong."
        )
    if unknown:
        raise WeftError(
            f"{outputs} has outputs for {len(unknown)} ids that are not in {references}, "
            f"{unknown[0]!r} first. Give the references of the same split."
        )
    return list(wanted)


def text(path: Path, name: str, value: Any) -> str:
    """Returns an output as text. Raises WeftError if it is none."""
    if not isinstance(value, str):
        raise WeftError(f"{path}, id {name!r}: the output {json_text.shortened(value)} is no text.")
    return value
