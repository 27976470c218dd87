"""The directory of a comparison: one JSON file a finished run, each written whole or not at all."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from ..errors import ConfigError, WeftError

SCHEMA = 1
LOGS = "logs"


def write_atomically(path: Path, text: str) -> None:
    """Under a temporary name, flushed to the disk, then renamed: after a crash the old file or the new one is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    if os.name == "posix":  # the rename itself is on the disk only when its directory is
        handle = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class Store:
    """Runs and measurements under `root`, by key."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @staticmethod
    def check(root: Path, resume: bool) -> None:
        """Refuse, before any compute, a place that cannot be used. Raises ConfigError."""
        if root.exists() and not root.is_dir():
            raise ConfigError(f"--out {str(root)!r} is a file; give a directory.")
        if not root.exists() or {path.name for path in root.iterdir()} <= {LOGS}:  # logs alone: it never got further
            return
        finished = len(list((root / "runs").glob("*.json")))
        if not (root / "sweep.json").is_file():
            raise ConfigError(f"--out {str(root)!r} is not empty and holds no comparison. Give a new directory.")
        if not resume:
            raise ConfigError(f"--out {str(root)!r} holds {finished} finished runs. Add --resume to go on from them, "
                              "or give another --out.")

    def match(self, identity: Mapping[str, Any]) -> bool:
        """Whether a comparison is there; raises ConfigError where it is another one."""
        path = self.root / "sweep.json"
        if not path.is_file():
            return False
        before = {"--budget": "steps", **_read(path)}  # of a comparison of before there were other budgets
        for field, value in identity.items():
            if before.get(field) != value:
                raise ConfigError(f"{self.root} holds a comparison with {field} {before.get(field)!r}, and this one "
                                  f"has {value!r}. Give another --out.")
        return True

    def open(self, identity: Mapping[str, Any]) -> None:
        """Create the directory, or check that it holds the same comparison. Raises ConfigError."""
        if not self.match(identity):
            write_atomically(self.root / "sweep.json", json.dumps({"schema": SCHEMA, **identity}, indent=1) + "\n")
        for left in self.root.rglob(".*.tmp"):
            left.unlink()

    def runs(self) -> dict[str, dict[str, Any]]:
        """Every finished run by its key."""
        return {path.stem: _read(path) for path in sorted((self.root / "runs").glob("*.json"))}

    def add_run(self, key: str, result: Mapping[str, Any]) -> None:
        write_atomically(self.root / "runs" / f"{key}.json", json.dumps(result) + "\n")

    def measures(self) -> dict[str, dict[str, Any]]:
        return {path.stem: _read(path) for path in sorted((self.root / "measures").glob("*.json"))}

    def add_measure(self, key: str, result: Mapping[str, Any]) -> None:
        write_atomically(self.root / "measures" / f"{key}.json", json.dumps(result, indent=1) + "\n")

    def adapter_path(self, label: str) -> Path:
        """Where the adapter of a row's first seed is saved; no two labels share a place."""
        plain = label.replace(" ", "-")
        safe = re.sub(r"[^A-Za-z0-9.=_-]+", "-", plain)
        return self.root / "adapters" / (safe if safe == plain else f"{safe}-{sha256(label.encode()).hexdigest()[:8]}")

    def adapters(self) -> dict[str, str]:
        """Label of a row -> key of the run whose adapter lies at `adapter_path(label)`."""
        path = self.root / "adapters" / "runs.json"
        return _read(path) if path.is_file() else {}

    def add_adapter(self, label: str, key: str) -> None:
        known = {**self.adapters(), label: key}
        write_atomically(self.root / "adapters" / "runs.json", json.dumps(known, indent=1) + "\n")


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeftError(f"{path} cannot be read ({error}). Delete it and add --resume: only that is done again."
                        ) from None
    if not isinstance(data, dict):
        raise WeftError(f"{path} is not a file of weft compare. Delete it and add --resume.")
    return data
