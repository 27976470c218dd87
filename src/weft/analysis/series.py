"""Which directories are the checkpoints of which run, from command-line arguments."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.files import RUN_ADAPTERS, RUN_RECORD, TENSORS
from ..errors import ConfigError

_NUMBERED = re.compile(r"checkpoint-(\d+)")
LOOSE = "adapters"  # the label of directories without one


@dataclass(frozen=True)
class Series:
    """The checkpoints of one run in order of time: (step, directory).

    Steps are those in the names checkpoint-N. If a directory has another name, all are numbered 1,
    2, ...
    """

    label: str
    places: tuple[tuple[int, Path], ...]


def read_series(words: Sequence[str]) -> list[Series]:
    """Parses `DIR` and `LABEL=DIR` into runs, in the order of first appearance of their labels.

    A directory of weft train (with checkpoints/), or a directory of checkpoint-N folders, is one
    run, labelled by its name. Adapter directories with the same label, or without one, are one run
    in the given order.

    Raises ConfigError if a directory does not exist or has no checkpoint, if one is given twice, or
    if two runs have the same label.
    """
    loose: dict[str, list[Path]] = {}
    found: dict[str, Series] = {}
    order: list[str] = []
    for word in words:
        label, path = _split_label(word)
        inside = _checkpoints(path)
        label = label or (_run_name(path) if inside else LOOSE)
        if label in found or (inside and label in loose):
            raise ConfigError(
                f"--adapters {word!r}: another run has the label {label!r}; give this one "
                "another label, LABEL=DIR."
            )
        if inside:
            found[label] = Series(label, tuple(inside))
        else:
            loose.setdefault(label, []).append(path)
        order += [] if label in order else [label]
    found |= {label: _in_order(label, paths) for label, paths in loose.items()}
    return [found[label] for label in order]


def _split_label(word: str) -> tuple[str, Path]:
    """The label, "" without one, and the directory. An existing directory with this name has no
    label.
    """
    label, equals, place = word.partition("=")
    if not equals or Path(word).expanduser().exists():
        label, place = "", word
    elif not label or not place:
        raise ConfigError(f"--adapters {word!r}: write LABEL=DIR or DIR.")
    path = Path(place).expanduser()
    if not path.is_dir():
        raise ConfigError(
            f"--adapters {word!r}: there is no directory {place!r}. Give a directory of weft "
            "train, or directories written by weft.save or peft."
        )
    return label, path


def _checkpoints(path: Path) -> list[tuple[int, Path]]:
    """(step, directory) of the checkpoints of a run; empty if `path` is an adapter's directory."""
    if (path / TENSORS).is_file():
        return []
    for folder in (path / "checkpoints", path):
        numbered = [
            (int(match[1]), child)
            for child in (folder.iterdir() if folder.is_dir() else ())
            if (match := _NUMBERED.fullmatch(child.name)) and (child / TENSORS).is_file()
        ]
        if numbered:
            return sorted(numbered)
    adapters = [path / name / TENSORS for name in RUN_ADAPTERS]
    if (path / RUN_RECORD).is_file() and any(file.is_file() for file in adapters):
        return []  # a run without checkpoints: its result, as every reader finds it
    raise ConfigError(
        f"--adapters {str(path)!r}: it has neither {TENSORS} nor folders checkpoint-N with one. "
        f"It has {sorted(child.name for child in path.iterdir())[:6] or 'nothing'}."
    )


def _run_name(path: Path) -> str:
    whole = path.resolve()
    return whole.parent.name if whole.name == "checkpoints" else whole.name


def _in_order(label: str, paths: Sequence[Path]) -> Series:
    twice = [
        path for i, path in enumerate(paths) if path.resolve() in [p.resolve() for p in paths[:i]]
    ]
    if twice:
        raise ConfigError(f"--adapters: {str(twice[0])!r} appears twice.")
    numbers = [
        int(match[1]) for path in paths if (match := _NUMBERED.fullmatch(path.resolve().name))
    ]
    if len(numbers) < len(paths):
        numbers = list(range(1, len(paths) + 1))
    if sorted(set(numbers)) != numbers:
        raise ConfigError(
            f"--adapters: the checkpoints of {label!r} have the steps {numbers}; give those of one "
            "run, in "
            "order, or each run a label: LABEL=DIR."
        )
    return Series(label, tuple(zip(numbers, paths, strict=True)))
