"""What `data.ignore` leaves out of the records as they are read.

    NAME              a column of the file
    messages.NAME     a key of messages, or of the parts of their content
    documents.NAME    a key of documents

A NAME that is no column but such a key is that key, unless Weft itself reads the key: who says
what, and what is in the loss, is left out only by its full name. Tool calls are data, and kept
whole.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from ..encoding.conversation import IN_LOSS
from ..errors import ConfigError
from ..tasks.files import Row

CONTENT = ("content", "value")  # a text or a list of parts, in Weft's convention and ShareGPT's
READ = ("role", "from", *CONTENT, *IN_LOSS)  # keys of a message that need their full name
PART = ("type", "text")  # keys of a part, which are what it says


def without_columns(rows: Sequence[Row], names: Collection[str]) -> list[Row]:
    """Returns the records without these columns."""
    return [{key: value for key, value in row.items() if key not in names} for row in rows]


def without_keys(row: Row, holders: Mapping[str, str], keys: Collection[str]) -> Row:
    """Returns a record without `keys` ("messages.id"). `holders` are its columns that hold messages
    or documents, and which of these two.
    """
    return _walk(row, holders, lambda key: key not in keys)


def keys_of(row: Row, holders: Mapping[str, str]) -> set[str]:
    """Returns all keys that `without_keys` could leave out of a record."""
    found: dict[str, bool] = {}
    _walk(row, holders, lambda key: found.setdefault(key, True))
    return set(found)


def ignored_keys(
    names: Iterable[str], columns: Collection[str], found: Collection[str]
) -> frozenset[str]:
    """Returns the keys that the names in `data.ignore` mean: those of `found`, all that there are.

    Raises ConfigError for a name that is none of `columns` and no key, with the nearest ones, and
    for a plain name of a key in READ.
    """
    keys: set[str] = set()
    for name in names:
        if name in columns:
            continue
        fitting = {key for key in found if name in (key, _plain(key))}
        if not fitting:
            raise _missing(name, columns, found)
        if name in READ and f"messages.{name}" in fitting:
            raise ConfigError(
                f"data.ignore: no record has a column {name!r}, and as a key of messages it says "
                f"what is trained on. Write messages.{name} if that is to be left out."
            )
        keys |= fitting
    return frozenset(keys)


def _missing(name: str, columns: Collection[str], found: Collection[str]) -> ConfigError:
    known = {_plain(key): key for key in found} | {key: key for key in (*found, *columns)}
    near = get_close_matches(name, known, n=2) or sorted(known.values())
    return ConfigError(
        f"data.ignore: no record has a column or a message key {name!r}. Nearest: "
        f"{', '.join(dict.fromkeys(known.get(each, each) for each in near))}."
    )


def _plain(key: str) -> str:
    return key.partition(".")[2]


def _walk(row: Row, holders: Mapping[str, str], keep: Callable[[str], bool]) -> Row:
    """The record with the keys for which `keep` is true; it is asked about all of them."""

    def kept(entry: Any, holder: str, always: Collection[str] = ()) -> Any:
        if not isinstance(entry, Mapping):
            return entry
        return {
            key: value for key, value in entry.items() if key in always or keep(f"{holder}.{key}")
        }

    def parts_kept(entry: Any, holder: str) -> Any:
        entry = kept(entry, holder)
        for key in CONTENT if isinstance(entry, Mapping) else ():
            if isinstance(entry.get(key), list):
                entry[key] = [kept(part, holder, PART) for part in entry[key]]
        return entry

    changed = {}
    for column, holder in holders.items():
        value = row.get(column)
        if isinstance(value, list):
            changed[column] = [parts_kept(entry, holder) for entry in value]
        elif isinstance(value, Mapping):
            changed[column] = parts_kept(value, holder)
    return {**row, **changed}
