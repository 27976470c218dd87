"""Tasks: data, decoding and a metric. A family is a file here and a line in `FAMILIES` or
`GENERATION`.

`FAMILIES` are labelled examples in three splits (`find_task(name).load()` is a `Task`);
`GENERATION` has text for an answer (`find_generation(name).load()` is a `GenerationTask`).
`scoring` scores files without a model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from ..errors import ConfigError
from .base import SPLITS, Encoded, Labelled, Split, Task
from .generation import GenerationTask, Record, Report, Sample, on_validation

IMAGES = {
    "cifar100": "CIFAR-100",
    "food101": "Food101",
    "flowers102": "Flowers102",
    "resisc45": "RESISC45",
}
GLUE = ("sst2", "mrpc", "cola", "qnli", "rte", "stsb", "mnli")
COMMONSENSE = (
    "commonsense",
    "boolq",
    "piqa",
    "siqa",
    "hellaswag",
    "winogrande",
    "arc-e",
    "arc-c",
    "obqa",
)
FAMILIES = {
    "digits": "scikit-learn's handwritten digits 5 to 9, 20 training images of each (offline)",
    "image-folder:DIR": "images in DIR/<class>/*.png, for any image classification model",
    **{
        f"{name}:DIR": f"{what}; :per_class=10 behind it for the paper's 10 images a class"
        for name, what in IMAGES.items()
    },
    "csv:FILE": "text classification, columns text,label or sentence,label (a pair too); .csv, "
    ".tsv, .gz",
    **{f"{name}:DIR": "GLUE, chosen on a part of train, reported on dev" for name in GLUE},
    **{f"{name}-paper:DIR": "GLUE as the papers do it, which is optimistic" for name in GLUE},
}
GENERATION = {
    "e2e:DIR": "the E2E challenge, restaurant descriptions from slots; BLEU, NIST, METEOR, "
    "ROUGE-L, CIDEr; "
    ":train=validation behind it (or any of these) where there is no training file",
    "wikisql:DIR": "WikiSQL, a question about a table to SQL; logical-form accuracy",
    "samsum:DIR": "SAMSum, summaries of chats; ROUGE-1, ROUGE-2, ROUGE-L",
    "commonsense:DIR": "eight commonsense data sets in instruction form; accuracy by "
    "generate-and-match",
    **{f"{name}:DIR": f"{name} of the eight" for name in COMMONSENSE[1:]},
}


@dataclass(frozen=True)
class TaskRef:
    """A task that has been asked for and exists; `path` and `test` are None for an embedded one, or
    one of the hub.
    """

    name: str
    kind: str
    path: Path | None = None
    test: Path | None = None
    per_class: int | None = None

    def load(self) -> Task:
        """Read the data. Raises WeftError with the file and line at fault."""
        if self.kind.removesuffix("-paper") in GLUE:
            from . import glue

            return glue.load(self.path, self.kind)
        if self.kind in IMAGES and self.path is not None:
            from . import image_sets

            return image_sets.load(self.path, self.kind, self.per_class)
        if self.path is None:
            from . import digits

            return digits.load()
        return _reader(self.kind)(self.path, self.test)


@dataclass(frozen=True)
class GenerationRef:
    """A generation task that has been asked for; `source` is a folder that exists, a hub name, or
    None for the usual one.

    on_validation: what is trained on is the validation part.
    """

    name: str
    kind: str
    source: Path | str | None = None
    on_validation: bool = False
    test: None = None  # it has its own

    def load(self) -> GenerationTask:
        """Read the data. Raises WeftError with the file and line at fault."""
        return on_validation(self._read()) if self.on_validation else self._read()

    def _read(self) -> GenerationTask:
        if self.kind in COMMONSENSE:
            from . import commonsense

            return commonsense.load(self.source, self.kind)
        from . import e2e, samsum, wikisql

        load: Callable[..., GenerationTask] = {
            "e2e": e2e.load,
            "samsum": samsum.load,
            "wikisql": wikisql.load,
        }[self.kind]
        return load() if self.source is None else load(self.source)


def find_any(name: str, test: str | None = None) -> TaskRef | GenerationRef:
    """A task of either kind, checked as `find_task` and `find_generation` do. Raises
    ConfigError.
    """
    if _known(name, name.partition(":")[0], {**FAMILIES, **GENERATION}) in FAMILIES:
        return find_task(name, test)
    if test is not None:
        raise ConfigError(f"task {name!r} has its own test data; it takes none of yours.")
    return find_generation(name)


def find_task(name: str, test: str | None = None) -> TaskRef:
    """Check a task's name and that its files exist, without reading them. Raises ConfigError with
    the nearest names.
    """
    kind, _, rest = name.partition(":")
    known = _known(name, kind, FAMILIES)
    glue = kind.removesuffix("-paper") in GLUE
    if glue and test is not None:
        raise ConfigError(
            f"task {name!r} has its own test data, GLUE's dev; it takes none of yours."
        )
    if ":" not in known:
        if rest or test is not None:
            raise ConfigError(
                f"task {name!r}: {kind!r} is built in; it takes no path and no test data of your "
                "own."
            )
        return TaskRef(name, kind)
    if not rest:
        if glue:
            return TaskRef(name, kind)
        raise ConfigError(f"task {name!r}: write {known}.")
    if kind in IMAGES:
        if test is not None:
            raise ConfigError(f"task {name!r} has its own test data; it takes none of yours.")
        place, each = _per_class(name, rest)
        return TaskRef(name, kind, _existing(place, True, f"task {kind}"), per_class=each)
    folder = kind != "csv"
    return TaskRef(
        name,
        kind,
        _existing(rest, folder, f"task {kind}"),
        _existing(test, folder, "test") if test else None,
    )


def find_generation(name: str) -> GenerationRef:
    """Check a generation task's name and that its folder exists, without reading it. Raises
    ConfigError.

    `e2e` alone is the hub's usual data set, `e2e:DIR` a folder, `e2e:owner/name` another one on the
    hub, any of them with `:train=validation` behind it. What looks like a path is never sought on
    the network.
    """
    from .files import is_hub_name

    kind, _, rest = name.partition(":")
    _known(name, kind, GENERATION)
    rest, trained = _option(rest, "train")
    if trained not in (None, "validation"):
        raise ConfigError(
            f"task {name!r}: train={trained} is not known; train=validation trains on the "
            "validation part."
        )
    held = trained is not None
    if not rest:
        return GenerationRef(name, kind, None, held)
    if is_hub_name(rest) and "/" in rest:
        if kind == "commonsense":
            raise ConfigError(
                f"task {name!r}: these are eight data sets; give a folder with all of them."
            )
        return GenerationRef(name, kind, rest, held)
    return GenerationRef(name, kind, _existing(rest, True, f"task {kind}"), held)


def _known(name: str, kind: str, families: Mapping[str, str]) -> str:
    known = {family.partition(":")[0]: family for family in families}
    if kind not in known:
        if kind == "mt-bench":
            raise ConfigError(
                f"task {name!r} is judged by another model: weft judge --questions FILE."
            )
        other = GENERATION if families is FAMILIES else FAMILIES
        if any(family.partition(":")[0] == kind for family in other):
            what = "text to generate" if families is FAMILIES else "classification"
            raise ConfigError(
                f"task {name!r} is {what}, and here a task of the other kind is wanted: "
                f"{list(known)[:6]} ..."
            )
        near = [known[k] for k in get_close_matches(kind, known, n=2)] or list(families)
        raise ConfigError(f"task {name!r} is not known. Nearest: {near}.")
    return known[kind]


def _per_class(name: str, rest: str) -> tuple[str, int | None]:
    """DIR:per_class=10 as DIR and 10. Raises ConfigError."""
    place, _, last = rest.rpartition(":")
    key, equals, value = last.partition("=")
    if not place or not equals or "/" in key or Path(rest).exists():
        return rest, None
    if key != "per_class" or not value.isdecimal() or int(value) < 1:
        raise ConfigError(
            f"task {name!r}: behind the folder stands per_class=N, the images of a class to train "
            "on."
        )
    return place, int(value)


def _option(rest: str, key: str) -> tuple[str, str | None]:
    """DIR:key=value as DIR and the value; the value is None where none stands there."""
    place, _, last = rest.rpartition(":")
    name, equals, value = last.partition("=")
    return (place, value) if equals and name == key and not Path(rest).exists() else (rest, None)


def _existing(name: str, folder: bool, what: str) -> Path:
    path = Path(name).expanduser()
    if not (path.is_dir() if folder else path.is_file()):
        state = (
            "there is nothing there"
            if not path.exists()
            else "it is a folder"
            if path.is_dir()
            else "it is a file"
        )
        raise ConfigError(f"{what}: {name!r} must be a {'folder' if folder else 'file'}; {state}.")
    return path


def _reader(kind: str) -> Callable[[Path, Path | None], Task]:
    from . import csv_text, image_folder

    return {"image-folder": image_folder.load, "csv": csv_text.load}[kind]


__all__ = [
    "FAMILIES",
    "GENERATION",
    "SPLITS",
    "Encoded",
    "GenerationRef",
    "GenerationTask",
    "Labelled",
    "Record",
    "Report",
    "Sample",
    "Split",
    "Task",
    "TaskRef",
    "find_any",
    "find_generation",
    "find_task",
]
