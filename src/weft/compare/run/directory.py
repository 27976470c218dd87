"""The output directory of a comparison."""

from __future__ import annotations

import re
from pathlib import Path

from ...errors import ConfigError
from ..files import write_atomically
from .study import Study
from .study_location import FILE, LOCK, StudyLocation

LOGS, ADAPTERS, LINK, MEASURING = "logs", "adapters", "study.txt", "measure"
# What a comparison leaves that stopped before its first run.
LEFTOVERS = {LOGS, f"{LOCK}.lock", f"{MEASURING}.lock"}


def check_directory(location: StudyLocation, resume: bool) -> None:
    """Refuses a directory that cannot be used, before any computation. Raises ConfigError."""
    out = location.out
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {str(out)!r} is a file; give a directory.")
    names = {path.name for path in out.iterdir()} if out.exists() else set()
    if names <= LEFTOVERS:
        return
    if location.url is None and LINK in names:
        raise ConfigError(
            f"--out {str(out)!r} belongs to the study {_link(out)}. Add --study, or give another "
            "--out."
        )
    if location.url is not None and FILE in names:
        raise ConfigError(
            f"--out {str(out)!r} has a comparison with its own study file. Give another --out "
            "with --study."
        )
    if LINK in names and _link(out) != str(location):
        raise ConfigError(
            f"--out {str(out)!r} belongs to the study {_link(out)}, and this is {location}. Give "
            "another --out."
        )
    if "sweep.json" in names:
        raise ConfigError(
            f"--out {str(out)!r} has a comparison of an earlier version of Weft in another "
            "format. Give a new directory."
        )
    if not names & {FILE, LINK}:
        raise ConfigError(
            f"--out {str(out)!r} is not empty and has no comparison. Give a new directory."
        )
    if not resume:
        raise ConfigError(
            f"--out {str(out)!r} has {_stored_runs(location)}. Add --resume to continue, "
            "or give another --out."
        )


def prepare_directory(location: StudyLocation) -> None:
    """Creates the directory. Writes the study's location if it is a database, and deletes temporary
    files of ended processes.
    """
    import psutil

    location.out.mkdir(parents=True, exist_ok=True)
    if location.url is not None:
        write_atomically(location.out / LINK, f"{location}\n")
    for left in location.out.rglob(".*.tmp"):
        writer = re.search(r"\.(\d+)(-[0-9a-f]+)?\.tmp$", left.name)
        if writer and not psutil.pid_exists(int(writer[1])):
            left.unlink(missing_ok=True)


def has_comparison(location: StudyLocation) -> bool:
    """Returns True if the directory has a comparison that can be resumed."""
    return (location.out / (FILE if location.url is None else LINK)).is_file()


def _link(out: Path) -> str:
    return (out / LINK).read_text(encoding="utf-8").strip()


def _stored_runs(location: StudyLocation) -> str:
    return f"{finished_runs(location)} finished runs" if location.url is None else "a comparison"


def finished_runs(location: StudyLocation) -> int:
    """Returns the number of finished runs in the study."""
    study = Study(location)
    try:
        return study.count()
    finally:
        study.close()


def adapter_name(label: str, key: str) -> str:
    """Returns the folder name of a run's adapter; it is unique per run."""
    return f"{re.sub(r'[^A-Za-z0-9.=_-]+', '-', label)[:60].strip('-')}-{key[:8]}"
