"""Tasks: labelled data in three splits and a metric. A family is a file here and a line in `FAMILIES`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from ..errors import ConfigError
from .base import SPLITS, Encoded, Split, Task, accuracy

FAMILIES = {
    "digits": "scikit-learn's handwritten digits 5 to 9, 20 training images of each (offline)",
    "image-folder:DIR": "images in DIR/<class>/*.png, for any image classification model",
    "csv:FILE": "text classification, columns text,label or sentence,label (a pair too); .csv, .tsv, .gz",
}


@dataclass(frozen=True)
class TaskRef:
    """A task that has been asked for and exists; `path` and `test` are None for an embedded one."""

    name: str
    kind: str
    path: Path | None = None
    test: Path | None = None

    def load(self) -> Task:
        """Read the data. Raises WeftError with the file and line at fault."""
        if self.path is None:
            from . import digits

            return digits.load()
        return _reader(self.kind)(self.path, self.test)


def find_task(name: str, test: str | None = None) -> TaskRef:
    """Check a task's name and that its files exist, without reading them. Raises ConfigError with the nearest names."""
    kind, _, rest = name.partition(":")
    known = {family.partition(":")[0]: family for family in FAMILIES}
    if kind not in known:
        near = [known[k] for k in get_close_matches(kind, known, n=2)] or list(FAMILIES)
        raise ConfigError(f"task {name!r} is not known. Nearest: {near}.")
    if ":" not in known[kind]:
        if rest or test is not None:
            raise ConfigError(f"task {name!r}: {kind!r} is built in; it takes no path and no test data of your own.")
        return TaskRef(name, kind)
    if not rest:
        raise ConfigError(f"task {name!r}: write {known[kind]}.")
    folder = kind == "image-folder"
    return TaskRef(name, kind, _existing(rest, folder, f"task {kind}"), _existing(test, folder, "test") if test else None)


def _existing(name: str, folder: bool, what: str) -> Path:
    path = Path(name).expanduser()
    if not (path.is_dir() if folder else path.is_file()):
        state = "there is nothing there" if not path.exists() else "it is a folder" if path.is_dir() else "it is a file"
        raise ConfigError(f"{what}: {name!r} must be a {'folder' if folder else 'file'}; {state}.")
    return path


def _reader(kind: str) -> Callable[[Path, Path | None], Task]:
    from . import csv_text, image_folder

    return {"image-folder": image_folder.load, "csv": csv_text.load}[kind]


__all__ = ["FAMILIES", "SPLITS", "Encoded", "Split", "Task", "TaskRef", "accuracy", "find_task"]
