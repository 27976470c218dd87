"""Tasks: data, decoding and a metric. A family is one file here and one line in `FAMILIES` or
`GENERATION`.

`FAMILIES` have labelled examples in three splits (`find_task(name).load()` returns a `Task`).
`GENERATION` tasks have text as answers (`find_generation(name).load()` returns a `GenerationTask`).
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
        f"{name}:DIR": f"{what}; add :per_class=10 for the paper's 10 images per class"
        for name, what in IMAGES.items()
    },
    "csv:FILE": "text classification, columns text,label or sentence,label (a pair too); .csv, "
    ".tsv, .gz",
    **{f"{name}:DIR": "GLUE, chosen on a part of train, reported on dev" for name in GLUE},
    **{f"{name}-paper:DIR": "GLUE as the papers do it, which is optimistic" for name in GLUE},
}
GENERATION = {
    "e2e:DIR": "the E2E challenge, restaurant descriptions from slots; BLEU, NIST, METEOR, "
    "ROUGE-L, CIDEr; add :train=validation (here or below) if there is no training file",
    "wikisql:DIR": "WikiSQL, a question about a table to SQL; logical-form accuracy",
    "samsum:DIR": "SAMSum, summaries of chats; ROUGE-1, ROUGE-2, ROUGE-L",
    "commonsense:DIR": "eight commonsense data sets in instruction form; accuracy by "
    "generate-and-match",
    **{f"{name}:DIR": f"{name} of the eight" for name in COMMONSENSE[1:]},
}
SHAPES = {
    "shapes-vqa": "questions about images of coloured shapes, as VQAv2; VQA accuracy (offline)",
    "shapes-nlvr": "is a sentence true of two images, as NLVR2; accuracy (offline)",
    "shapes-caption": "descriptions of images, as COCO captions; CIDEr (offline)",
    "shapes-video": "questions about clips with four choices, as TVQA; accuracy (offline)",
}


@dataclass(frozen=True)
class TaskRef:
    """A known task. `path` and `test` are None for an embedded task and for one of the hub."""

    name: str
    kind: str
    path: Path | None = None
    test: Path | None = None
    per_class: int | None = None

    def load(self) -> Task:
        """Reads the data. Raises WeftError with the invalid file and line."""
        if self.kind.removesuffix("-paper") in GLUE:
            from .glue import load_glue

            return load_glue(self.path, self.kind)
        if self.kind in IMAGES and self.path is not None:
            from .image_sets import load_image_set

            return load_image_set(self.path, self.kind, self.per_class)
        if self.path is None:
            from .digits import load_digits

            return load_digits()
        return _loader_of(self.kind)(self.path, self.test)


@dataclass(frozen=True)
class GenerationRef:
    """A known generation task. `source` is an existing folder, a hub name, or None for the task's
    hub data set.

    If `on_validation`, the validation part is used for training.
    """

    name: str
    kind: str
    source: Path | str | None = None
    on_validation: bool = False
    test: None = None  # the task has its own test data

    def load(self) -> GenerationTask:
        """Reads the data. Raises WeftError with the invalid file and line."""
        return on_validation(self._read()) if self.on_validation else self._read()

    def _read(self) -> GenerationTask:
        if self.kind in COMMONSENSE:
            from .commonsense import load_commonsense

            return load_commonsense(self.source, self.kind)
        from .e2e import load_e2e
        from .samsum import load_samsum
        from .wikisql import load_wikisql

        load: Callable[..., GenerationTask] = {
            "e2e": load_e2e,
            "samsum": load_samsum,
            "wikisql": load_wikisql,
        }[self.kind]
        return load() if self.source is None else load(self.source)


@dataclass(frozen=True)
class ShapesRef:
    """A task of the embedded world of shapes."""

    name: str
    kind: str
    test: None = None


def find_any(name: str, test: str | None = None) -> TaskRef | GenerationRef | ShapesRef:
    """Finds a task of any kind, as `find_task` and `find_generation` do. Raises ConfigError if
    it does not exist or takes no test data.
    """
    kind = name.partition(":")[0]
    known = _known(name, kind, {**FAMILIES, **GENERATION, **SHAPES})
    if known in FAMILIES:
        return find_task(name, test)
    if known in SHAPES and name != kind:
        raise ConfigError(f"task {name!r}: {kind!r} is built in; it accepts no path.")
    if known in SHAPES and test is None:
        return ShapesRef(name, kind)
    if test is not None:
        raise ConfigError(f"task {name!r} has its own test data; it accepts no other test data.")
    return find_generation(name)


def find_task(name: str, test: str | None = None) -> TaskRef:
    """Checks a task's name and that its files exist, without reading them. Raises ConfigError with
    the nearest names.
    """
    kind, _, rest = name.partition(":")
    known = _known(name, kind, FAMILIES)
    glue = kind.removesuffix("-paper") in GLUE
    if glue and test is not None:
        raise ConfigError(
            f"task {name!r} has its own test data, GLUE's dev; it accepts no other test data."
        )
    if ":" not in known:
        if rest or test is not None:
            raise ConfigError(
                f"task {name!r}: {kind!r} is built in; it accepts no path and no test data."
            )
        return TaskRef(name, kind)
    if not rest:
        if glue:
            return TaskRef(name, kind)
        raise ConfigError(f"task {name!r}: write {known}.")
    if kind in IMAGES:
        if test is not None:
            raise ConfigError(
                f"task {name!r} has its own test data; it accepts no other test data."
            )
        folder_name, each = _per_class(name, rest)
        return TaskRef(name, kind, _existing(folder_name, True, f"task {kind}"), per_class=each)
    folder = kind != "csv"
    return TaskRef(
        name,
        kind,
        _existing(rest, folder, f"task {kind}"),
        _existing(test, folder, "test") if test else None,
    )


def find_generation(name: str) -> GenerationRef:
    """Checks a generation task's name and that its folder exists, without reading it.

    `e2e` alone is the data set on the hub, `e2e:DIR` a folder, `e2e:owner/name` another data set on
    the hub; each can end in `:train=validation`. A name that looks like a path is never looked up
    on the network. Raises ConfigError if the name or the folder is not known.
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
    validation = trained is not None
    if not rest:
        return GenerationRef(name, kind, None, validation)
    if is_hub_name(rest) and "/" in rest:
        if kind == "commonsense":
            raise ConfigError(
                f"task {name!r}: the hub has no data set with all eight; give a folder."
            )
        return GenerationRef(name, kind, rest, validation)
    return GenerationRef(name, kind, _existing(rest, True, f"task {kind}"), validation)


def _known(name: str, kind: str, families: Mapping[str, str]) -> str:
    known = {family.partition(":")[0]: family for family in families}
    if kind not in known:
        if kind == "mt-bench":
            raise ConfigError(
                f"task {name!r} is graded by another model: weft judge --questions FILE."
            )
        other = GENERATION if families is FAMILIES else FAMILIES
        if any(family.partition(":")[0] == kind for family in other):
            what = "text to generate" if families is FAMILIES else "classification"
            raise ConfigError(
                f"task {name!r} is {what}, but this needs a task of the other kind: "
                f"{list(known)[:6]} ..."
            )
        near = [known[k] for k in get_close_matches(kind, known, n=2)] or list(families)
        raise ConfigError(f"task {name!r} is not known. Nearest: {near}.")
    return known[kind]


def _per_class(name: str, rest: str) -> tuple[str, int | None]:
    """Splits DIR:per_class=10 into DIR and 10. Raises ConfigError if the option is invalid."""
    folder_name, _, last = rest.rpartition(":")
    key, equals, value = last.partition("=")
    if not folder_name or not equals or "/" in key or Path(rest).exists():
        return rest, None
    if key != "per_class" or not value.isdecimal() or int(value) < 1:
        raise ConfigError(
            f"task {name!r}: after the folder, write per_class=N, the number of training images "
            "per class."
        )
    return folder_name, int(value)


def _option(rest: str, key: str) -> tuple[str, str | None]:
    """Splits DIR:key=value into DIR and the value, or None if there is no such option."""
    folder_name, _, last = rest.rpartition(":")
    name, equals, value = last.partition("=")
    return (
        (folder_name, value) if equals and name == key and not Path(rest).exists() else (rest, None)
    )


def _existing(name: str, folder: bool, what: str) -> Path:
    path = Path(name).expanduser()
    if not (path.is_dir() if folder else path.is_file()):
        state = (
            "it does not exist"
            if not path.exists()
            else "it is a folder"
            if path.is_dir()
            else "it is a file"
        )
        raise ConfigError(f"{what}: {name!r} must be a {'folder' if folder else 'file'}; {state}.")
    return path


def _loader_of(kind: str) -> Callable[[Path, Path | None], Task]:
    from .csv_text import load_csv
    from .image_folder import load_image_folder

    return {"image-folder": load_image_folder, "csv": load_csv}[kind]


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
