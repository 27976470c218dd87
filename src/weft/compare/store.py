"""The directory of a comparison: what may be in it, and files that are written whole or not at
all.
"""

from __future__ import annotations

import re
from pathlib import Path

from ..checkpoint.files import replace
from ..errors import ConfigError
from .place import FILE, LOCK, Place
from .study import Study

SCHEMA = 1
LOGS, ADAPTERS, LINK, MEASURING = "logs", "adapters", "study.txt", "measure"
FREE = {
    LOGS,
    f"{LOCK}.lock",
    f"{MEASURING}.lock",
}  # a comparison that never got further leaves no more than these


def write_atomically(path: Path, text: str) -> None:
    """Under a temporary name, flushed to the disk, then renamed: after a crash the old file or the
    new one is there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def check(place: Place, resume: bool) -> None:
    """Refuse, before any compute, a directory that cannot be used. Raises ConfigError."""
    out = place.out
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {str(out)!r} is a file; give a directory.")
    there = {path.name for path in out.iterdir()} if out.exists() else set()
    if there <= FREE:
        return
    if place.url is None and LINK in there:
        raise ConfigError(
            f"--out {str(out)!r} belongs to the study {_link(out)}. Add --study, or give another "
            "--out."
        )
    if place.url is not None and FILE in there:
        raise ConfigError(
            f"--out {str(out)!r} holds a comparison with a study of its own. Give another --out "
            "with --study."
        )
    if LINK in there and _link(out) != str(place):
        raise ConfigError(
            f"--out {str(out)!r} belongs to the study {_link(out)}, and this is {place}. Give "
            "another --out."
        )
    if "sweep.json" in there:
        raise ConfigError(
            f"--out {str(out)!r} holds a comparison of an earlier Weft, which kept its runs "
            "otherwise. "
            "Give a new directory."
        )
    if not there & {FILE, LINK}:
        raise ConfigError(
            f"--out {str(out)!r} is not empty and holds no comparison. Give a new directory."
        )
    if not resume:
        raise ConfigError(
            f"--out {str(out)!r} holds {_kept(place)}. Add --resume to go on from them, "
            "or give another --out."
        )


def prepare(place: Place) -> None:
    """The directory, with a word on its study where that is elsewhere, and without half-written
    files of dead processes.
    """
    import psutil

    place.out.mkdir(parents=True, exist_ok=True)
    if place.url is not None:
        write_atomically(place.out / LINK, f"{place}\n")
    for left in place.out.rglob(".*.tmp"):
        writer = re.search(r"\.(\d+)(-[0-9a-f]+)?\.tmp$", left.name)
        if writer and not psutil.pid_exists(int(writer[1])):
            left.unlink(missing_ok=True)


def is_there(place: Place) -> bool:
    """Whether the directory holds a comparison to go on from."""
    return (place.out / (FILE if place.url is None else LINK)).is_file()


def _link(out: Path) -> str:
    return (out / LINK).read_text(encoding="utf-8").strip()


def _kept(place: Place) -> str:
    return f"{kept(place)} finished runs" if place.url is None else "a comparison"


def kept(place: Place) -> int:
    """Finished runs of the study."""
    study = Study(place)
    try:
        return study.count()
    finally:
        study.close()


def adapter_name(label: str, key: str) -> str:
    """The folder of the adapter that a run leaves; no two runs share one."""
    return f"{re.sub(r'[^A-Za-z0-9.=_-]+', '-', label)[:60].strip('-')}-{key[:8]}"
