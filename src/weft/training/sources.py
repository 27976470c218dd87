"""Where samples come from: a file, a folder, a glob, a data set saved to disk, a name on the hub,
or a list of these.

A folder stands for all its files. What would be left out in silence is an error: a file of another
format, a folder within, and files of several splits, of which the test set must not be trained on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from ..errors import ConfigError, WeftError
from ..tasks import files
from ..tasks.files import Numbered

# Files in a folder that are about the data and no data.
_ABOUT = ("readme", "license", "licence", "citation", "changelog")
_SPLITS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "dev": "validation",
    "eval": "validation",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
}
SAVED = ("state.json", "dataset_dict.json")  # what datasets' save_to_disk writes
_MAGIC = "*?["


def names_of(given: str | Sequence[str]) -> list[str]:
    """Returns the names in `data.train` or `data.eval`, which may be one name."""
    return [given] if isinstance(given, str) else list(given)


def title_of(given: str | Sequence[str]) -> str:
    """Returns what messages call the samples: the name, or the first of several."""
    first, *more = names_of(given)
    return f"{first} and {len(more)} more" if more else first


def check_source(given: str | Sequence[str], key: str) -> None:
    """Raises ConfigError unless each name is an existing source of samples or a hub name. Nothing
    is loaded.
    """
    names = names_of(given)
    if not names:
        raise ConfigError(
            f"{key}=[]: write a file, a folder, a glob, a hub name, or a list of these."
        )
    found = [part for name in names for part in _parts(name, key)]
    twice, count = Counter(found).most_common(1)[0]
    if count > 1:
        raise ConfigError(
            f"{key}: {twice!r} is given {count} times; its samples would count as often."
        )


def has_splits(given: str | Sequence[str]) -> bool:
    """Returns True if a name is one of the hub, or a saved data set with splits."""
    return any(
        files.is_hub_name(name) or (Path(name).expanduser() / SAVED[1]).is_file()
        for name in names_of(given)
    )


def read_source(
    given: str | Sequence[str], key: str, config: str | None, split: str
) -> list[Numbered]:
    """Returns all records, each with its place ("data.jsonl, line 7"). Raises WeftError."""
    rows: list[Numbered] = []
    for name in names_of(given):
        for part in _parts(name, key):
            rows += _read(part, config, split)
    return rows


def folder_of(place: str) -> Path | None:
    """Returns the folder of the file of a place that `read_source` returned, or None for records of
    the hub.
    """
    path = Path(place.rpartition(", ")[0]).expanduser()
    return path.absolute().parent if path.exists() else None


def _read(name: str, config: str | None, split: str) -> list[Numbered]:
    path = Path(name).expanduser()
    if path.is_file():
        return [(f"{name}, {at}", row) for at, row in files.numbered_rows(path, plain=True)]
    rows = files.saved_rows(path, split) if path.is_dir() else files.hub_rows(name, config, split)
    if rows is None:
        raise WeftError(
            f"data {name!r} has no split {split!r}; data.split and data.eval_split name it."
        )
    return [(f"{name}, record {number}", row) for number, row in enumerate(rows, 1)]


def _parts(name: str, key: str) -> list[str]:
    """The files of a folder or glob; else the name itself. Raises ConfigError if there are none."""
    path = Path(name).expanduser()
    if path.is_dir():
        return [name] if _is_saved(path) else _folder(path, key)
    if path.is_file():
        _check_format(path, f"{key}={name!r}")
        return [name]
    if any(mark in name for mark in _MAGIC):
        found = _fitting(path)
        if not found:
            raise ConfigError(f"{key}={name!r}: no file fits.")
        for each in found:
            _check_format(Path(each), f"{key}={name!r}: {each!r}")
        return found
    if files.is_table(path) or not files.is_hub_name(name):
        near = get_close_matches(
            path.name, [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else [], n=2
        )
        raise ConfigError(
            f"{key}={name!r}: there is no such file."
            + (f" Nearest: {', '.join(near)}." if near else "")
        )
    return [name]


def _fitting(pattern: Path) -> list[str]:
    """The files that a glob means, sorted; ** stands for any number of folders. Names that begin
    with a dot do not fit.
    """
    parts = pattern.parts
    first = next(i for i, part in enumerate(parts) if any(mark in part for mark in _MAGIC))
    root = Path(*parts[:first])
    found = root.glob("/".join(parts[first:]))
    return sorted(
        str(p)
        for p in found
        if p.is_file() and not any(part.startswith(".") for part in p.relative_to(root).parts)
    )


def _folder(path: Path, key: str) -> list[str]:
    inside = sorted(p for p in path.iterdir() if not p.name.startswith((".", "_")))
    found = [p for p in inside if p.stem.lower() not in _ABOUT]
    other = next((p for p in found if not p.is_file() or not files.is_table(p)), None)
    if other is not None or not found:
        what = f"it has {other.name!r}" if other is not None else "it has none"
        raise ConfigError(
            f"{key}={str(path)!r}: all files of a folder are read, which must end in one of "
            f"{', '.join(files.FORMATS)} (.gz may follow); {what}. Choose files with a glob, for "
            f"example {str(path / '*.jsonl')!r}, or a list."
        )
    splits = {split: p for p in found if (split := _split_of(p)) is not None}
    if len(splits) > 1:
        first, second, *_ = splits.values()
        raise ConfigError(
            f"{key}={str(path)!r}: {first.name!r} and {second.name!r} are different splits, and all "
            f"files of a folder are read. Name the files, for example {str(first)!r}."
        )
    return [str(p) for p in found]


def _split_of(path: Path) -> str | None:
    """ "test" for test.jsonl and test-00000-of-00001.parquet."""
    word = path.name.lower().split(".")[0].split("-")[0].split("_")[0]
    return _SPLITS.get(word)


def _is_saved(path: Path) -> bool:
    return any((path / name).is_file() for name in SAVED)


def _check_format(path: Path, what: str) -> None:
    if not files.is_table(path):
        raise ConfigError(
            f"{what}: the file's name does not end in a known format: {', '.join(files.FORMATS)} "
            "(and .gz)."
        )
