"""CIFAR-100, Food101, Flowers102 and RESISC45, as in VeRA's paper (arXiv:2310.11454, section 4.4)
and in full.

`cifar100:DIR:per_class=10` trains on 10 images per class, validates on 10 others and reports the
whole test set (RESISC45 has none: all other images). Without per_class everything is used. The
images that the paper drew are unknown; ours are drawn per class with a fixed seed. DIR contains one
of

the authors' files      cifar-100-binary (train.bin, test.bin), food-101 (images/, meta/),
flowers-102 (jpg/, *.mat) folders                 train/<class>/*.jpg and test/<class>/*.jpg, with
or without validation; or <class>/*.jpg alone parquet, as on the hub  train-*.parquet and
test-*.parquet, at any depth

"cifar-100-python" is a pickle, which can run any code when it is opened, so it is refused.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import WeftError
from .base import SPLIT_SEED, SPLITS, Split, Task, divide, stratified
from .files import read_lines
from .image_folder import SUFFIXES, Stored, listed

VALIDATION = 0.1  # share of train, if all of it is used and there is no validation part
NAMES = {"train": ("train",), "validation": ("validation", "valid", "val"), "test": ("test",)}
CIFAR_ROW, CIFAR_SIDE = 2 + 3 * 32 * 32, 32
Part = tuple[list[Any], list[str]]  # images (PIL's, or Stored) and the names of their classes
Parts = dict[str, Part]  # by split; "all" if the files have no splits


@dataclass(frozen=True)
class ImageSet:
    """`classes` is their number. `read` reads the authors' files and returns None if they are
    missing. `label` are its columns in parquet.
    """

    classes: int
    read: Callable[[Path], Parts | None] = lambda _: None
    label: tuple[str, ...] = ("label",)
    rest_is_test: bool = False  # without a test set


def load_image_set(path: Path, kind: str, per_class: int | None = None) -> Task:
    """Loads the data set `kind`, one of SETS. Raises WeftError if no format fits, or if a class is
    missing or too small.
    """
    known = SETS[kind]
    where = f"{kind}:{path}" + (f":per_class={per_class}" if per_class is not None else "")
    parts, notes = _parts(path, kind, known)
    if per_class is not None and known.rest_is_test:
        parts = {
            "all": (
                [item for items, _ in parts.values() for item in items],
                [label for _, labels in parts.values() for label in labels],
            )
        }
    classes = _check_classes(where, parts, known)
    number = {name: i for i, name in enumerate(classes)}
    splits = {
        name: Split(items, [number[label] for label in labels])
        for name, (items, labels) in parts.items()
    }
    made, said = (
        _few(where, splits, classes, per_class)
        if per_class is not None
        else _full(where, splits, classes)
    )
    return Task(where, "image", classes, made, (*notes, said))


def _parts(path: Path, kind: str, known: ImageSet) -> tuple[Parts, list[str]]:
    _refuse_pickle(path)
    parts = known.read(path) or _folders(path) or _parquet(path, known.label)
    if parts is None:
        have = sorted(p.name for p in path.iterdir())[:8]
        raise WeftError(
            f"{kind}:{path} has none of the supported formats: the authors' files unpacked, "
            "folders "
            f"train/<class> and test/<class>, <class>/*.jpg, or train-*.parquet. It has "
            f"{have or 'nothing'}."
        )
    if "validation" in parts and "test" not in parts:  # Food101 on the hub
        parts["test"] = parts.pop("validation")
        return parts, [
            (f"{kind}:{path}: the files have no test part; the validation part is used instead.")
        ]
    if "all" not in parts and not {"train", "test"} <= set(parts):
        raise WeftError(f"{kind}:{path} has only {sorted(parts)}; train and test are needed.")
    return parts, []


def _check_classes(where: str, parts: Parts, known: ImageSet) -> tuple[str, ...]:
    """Checks that every part has the same classes, and their number."""
    for name, (_, labels) in parts.items():
        if len(set(labels)) != known.classes:
            raise WeftError(
                f"{where}: {name} has {len(set(labels))} classes, and the set has {known.classes}. "
                "If this is intended, use image-folder:DIR."
            )
    found = [set(labels) for _, labels in parts.values()]
    first = found[0]
    odd = sorted({name for other in found for name in other ^ first})
    if odd:
        raise WeftError(f"{where}: not every part has the classes {odd[:5]}.")
    return tuple(
        sorted(
            first, key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else 0, name)
        )
    )


def _few(
    where: str, splits: Mapping[str, Split], classes: Sequence[str], each: int
) -> tuple[dict[str, Split], str]:
    """`each` images per class for training, as many others for validation, and the test set."""
    pool = splits.get("all", splits.get("train"))
    assert pool is not None
    own = splits.get("validation")
    train: list[int] = []
    validation: list[int] = []
    for label, name in enumerate(classes):
        rows = [i for i, other in enumerate(pool.labels) if other == label]
        needed = each * (1 if own is not None else 2) + ("all" in splits)
        if len(rows) < needed:
            raise WeftError(
                f"{where}: class {name!r} has {len(rows)} images, and {needed} are needed."
            )
        random.Random(f"{SPLIT_SEED}/per_class/{label}").shuffle(rows)
        train += rows[:each]
        validation += rows[each : 2 * each] if own is None else []
    used = {*train, *validation}
    rest = [i for i in range(len(pool)) if i not in used]
    made = {
        "train": pool.take(sorted(train)),
        "validation": own if own is not None else pool.take(sorted(validation)),
        "test": splits["test"] if "test" in splits else pool.take(rest),
    }
    chosen = "the validation part" if own is not None else f"{each} others of each class"
    reported = "all other images" if "all" in splits else "the whole test part"
    return made, (
        f"{where}: train is {each} images of each class, drawn by a fixed seed; validation is "
        f"{chosen}; test is "
        f"{reported}."
    )


def _full(
    where: str, splits: Mapping[str, Split], classes: Sequence[str]
) -> tuple[dict[str, Split], str]:
    if "all" in splits:
        whole = splits["all"]
        _, made, notes = divide(
            where, whole.items, [classes[int(label)] for label in whole.labels], None
        )
        return made, f"{notes[0]} The files have no test set."
    if "validation" in splits:
        return {
            name: splits[name] for name in SPLITS
        }, f"{where}: train, validation and test are those of the files."
    train, validation = stratified(splits["train"].labels, (1 - VALIDATION, VALIDATION))
    made = {
        "train": splits["train"].take(train),
        "validation": splits["train"].take(validation),
        "test": splits["test"],
    }
    return (
        made,
        (
            f"{where}: validation is {VALIDATION:.0%} of train, by class and a fixed seed; test "
            "is the "
            "whole test part."
        ),
    )


def _inside(path: Path, folder: str, *files: str) -> Path | None:
    """`path`, or its subfolder from the archive, if it has these files."""
    return next(
        (
            place
            for place in (path, path / folder)
            if all((place / file).exists() for file in files)
        ),
        None,
    )


def _refuse_pickle(path: Path) -> None:
    for place in (path, path / "cifar-100-python"):
        if all((place / name).is_file() for name in ("train", "test", "meta")):
            raise WeftError(
                f"{place} is the Python version of CIFAR-100: pickles, which can run any code and "
                "are never "
                "opened. Use cifar-100-binary.tar.gz from the same page, or the hub's parquet "
                "files."
            )


def _cifar(path: Path) -> Parts | None:
    """A row is the coarse label, the fine label, and 1,024 bytes each of red, green and blue, from
    the top left.
    """
    place = _inside(path, "cifar-100-binary", "train.bin", "test.bin")
    if place is None:
        return None
    import numpy as np
    from PIL import Image

    names = place / "fine_label_names.txt"
    called = (
        [line for line in read_lines(names) if line]
        if names.is_file()
        else [str(i) for i in range(100)]
    )
    parts: Parts = {}
    for name in ("train", "test"):
        data = np.frombuffer((place / f"{name}.bin").read_bytes(), np.uint8)
        if data.size == 0 or data.size % CIFAR_ROW:
            raise WeftError(
                f"{place / name}.bin has {data.size} bytes, no multiple of {CIFAR_ROW}: it is "
                "truncated, or another file."
            )
        rows = data.reshape(-1, CIFAR_ROW)
        if int(rows[:, 1].max()) >= len(called):
            raise WeftError(
                f"{place / name}.bin has the label {rows[:, 1].max()}, but there are "
                f"{len(called)} classes."
            )
        pixels = rows[:, 2:].reshape(-1, 3, CIFAR_SIDE, CIFAR_SIDE).transpose(0, 2, 3, 1)
        parts[name] = (
            [Image.fromarray(np.ascontiguousarray(one)) for one in pixels],
            [called[i] for i in rows[:, 1]],
        )
    return parts


def _food(path: Path) -> Parts | None:
    """meta/train.txt and test.txt list the images as class/number."""
    place = _inside(path, "food-101", "images", "meta/train.txt", "meta/test.txt")
    if place is None:
        return None
    parts: Parts = {}
    for name in ("train", "test"):
        named = [line for line in read_lines(place / "meta" / f"{name}.txt") if line]
        files = [place / "images" / f"{line}.jpg" for line in named]
        _all_there(files, place / "meta" / f"{name}.txt")
        parts[name] = (
            [Stored(str(file)) for file in files],
            [line.partition("/")[0] for line in named],
        )
    return parts


def _flowers(path: Path) -> Parts | None:
    """imagelabels.mat has the class of each image, setid.mat the numbers of train, validation and
    test, both from 1.
    """
    place = _inside(path, "flowers-102", "jpg", "imagelabels.mat", "setid.mat")
    if place is None:
        return None
    from scipy.io import loadmat

    try:
        labels = [str(int(label)) for label in loadmat(place / "imagelabels.mat")["labels"].ravel()]
        ids = loadmat(place / "setid.mat")
        chosen = {
            name: [int(i) for i in ids[key].ravel()]
            for name, key in (("train", "trnid"), ("validation", "valid"), ("test", "tstid"))
        }
    except Exception as error:  # errors of scipy, and any error from a damaged file
        raise WeftError(
            f"{place}: imagelabels.mat or setid.mat cannot be read: {type(error).__name__} {error}"
        ) from None
    odd = [i for numbers in chosen.values() for i in numbers if not 1 <= i <= len(labels)]
    if odd:
        raise WeftError(
            f"{place}: setid.mat names image {odd[0]}, and imagelabels.mat has {len(labels)} "
            "labels."
        )
    parts: Parts = {}
    for name, numbers in chosen.items():
        files = [place / "jpg" / f"image_{i:05d}.jpg" for i in numbers]
        _all_there(files, place / "setid.mat")
        parts[name] = ([Stored(str(file)) for file in files], [labels[i - 1] for i in numbers])
    return parts


def _all_there(files: Sequence[Path], named_by: Path) -> None:
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise WeftError(
            f"{missing[0]} is missing, although {named_by} lists it; {len(missing)} of "
            f"{len(files)} "
            "are missing."
        )


def _folders(path: Path) -> Parts | None:
    """train/<class> and so on; or <class> alone, in `path` or in its only folder."""
    parts = {
        split: listed(place)
        for split, names in NAMES.items()
        if (place := next((path / n for n in names if (path / n).is_dir()), None)) is not None
    }
    if parts:
        return (
            {name: (list(items), labels) for name, (items, labels) in parts.items()}
            if _pictures(path)
            else None
        )
    inner = [p for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")]
    place = inner[0] if len(inner) == 1 else path
    if not any(
        _is_image(file)
        for folder in place.iterdir()
        if folder.is_dir()
        for file in folder.iterdir()
    ):
        return None
    items, labels = listed(place)
    return {"all": (list(items), labels)}


def _pictures(path: Path) -> bool:
    return any(_is_image(file) for file in path.glob("*/*/*"))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


def _parquet(path: Path, labels: Sequence[str]) -> Parts | None:
    parts: Parts = {}
    for split, names in NAMES.items():
        files = sorted(
            f for f in path.rglob("*.parquet") if f.name.split("-")[0].split(".")[0] in names
        )
        for file in files:
            items, named = _image_rows(file, labels)
            held = parts.setdefault(split, ([], []))
            held[0].extend(items)
            held[1].extend(named)
    return parts or None


def _image_rows(file: Path, labels: Sequence[str]) -> Part:
    """Images of one file, as bytes; its other columns are not read."""
    from pyarrow import ArrowException, parquet

    try:
        have = parquet.read_schema(file).names
        image = next((name for name in ("img", "image") if name in have), None)
        label = next((name for name in labels if name in have), None)
        if image is None or label is None:
            raise WeftError(
                f"{file} has the columns {have}; it needs 'image' or 'img', and "
                f"{' or '.join(labels)}."
            )
        rows = parquet.read_table(file, columns=[image, label]).to_pylist()
    except (ArrowException, OSError) as error:
        raise WeftError(f"{file} cannot be read as parquet: {str(error).splitlines()[0]}") from None
    items: list[Any] = []
    for number, row in enumerate(rows, start=1):
        data = row[image].get("bytes") if isinstance(row[image], dict) else row[image]
        if not isinstance(data, bytes) or row[label] is None:
            raise WeftError(
                f"{file}, row {number}: {image} must be the bytes of an image, and {label} its "
                "class."
            )
        items.append(Stored(f"{file}, row {number}", data))
    return items, [str(row[label]) for row in rows]


SETS = {
    "cifar100": ImageSet(100, _cifar, ("fine_label", "label")),
    "food101": ImageSet(101, _food),
    "flowers102": ImageSet(102, _flowers),
    "resisc45": ImageSet(45, rest_is_test=True),
}
