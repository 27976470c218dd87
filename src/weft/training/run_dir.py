"""The directory of a run, which tells everything: what was asked, what it ran on, what happened,
and the result.

* config.yaml: the resolved configuration, defaults included
* run.json: versions, seeds, fingerprints of model and data, result
* log.jsonl: one line a logged step or evaluation
* adapter/: the result, as weft.save writes it; best/: the adapter of the best evaluation
  (eval.best)
* curves.png: loss, rate, gradient norm, evaluations; README.md: the model card
* checkpoints/: to go on from
"""

from __future__ import annotations

import json
import math
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from ..checkpoint import files
from ..errors import ConfigError, WeftError
from .config import RunConfig, dump, to_dict
from .resume import check_config, check_same, newest

SCHEMA = 1
PACKAGES = (
    "weft",
    "torch",
    "transformers",
    "accelerate",
    "numpy",
    "safetensors",
    "tokenizers",
    "datasets",
)


@dataclass(frozen=True)
class RunDir:
    """Paths below `root`."""

    root: Path

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def adapter(self) -> Path:
        return self.root / "adapter"

    @property
    def best(self) -> Path:
        return self.root / "best"

    @property
    def record(self) -> Path:
        return self.root / "run.json"

    def check(self, config: RunConfig, go_on: bool) -> None:
        """Whether a run may begin or go on here, before anything is loaded. Raises ConfigError."""
        place = next(
            path for path in (self.root.absolute(), *self.root.absolute().parents) if path.exists()
        )
        if not place.is_dir():
            raise ConfigError(f"out={str(self.root)!r}: {place} is a file; give a directory.")
        if not os.access(place, os.W_OK | os.X_OK):
            raise ConfigError(
                f"out={str(self.root)!r}: nothing may be written into {place}. Give another "
                "directory."
            )
        there = self.record.is_file()
        if there and not go_on:
            raise ConfigError(
                f"out={str(self.root)!r} holds a run. Add --resume to go on with it, or give "
                "another out."
            )
        if there:
            check_config(self.read()["config"], to_dict(config), self.root)
        elif go_on:
            raise ConfigError(
                f"out={str(self.root)!r} holds no run to go on with. Leave --resume out to begin "
                "one there, "
                "or give the out of the run that is meant."
            )
        elif self.root.is_dir() and any(
            not path.name.startswith(".") for path in self.root.iterdir()
        ):
            raise ConfigError(
                f"out={str(self.root)!r} is not empty and holds no run. Give a new directory."
            )

    @contextmanager
    def alone(self) -> Iterator[None]:
        """No other process trains in this directory meanwhile; the system frees the lock of one
        that was killed.

        Raises ConfigError where another one does.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        if sys.platform == "win32":
            yield
            return
        import fcntl

        handle = os.open(self.root, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise ConfigError(
                f"out={str(self.root)!r}: another process is training there. Wait for it, or give "
                "another "
                "out."
            ) from None
        except OSError:  # a file system without locks
            pass
        try:
            yield
        finally:
            os.close(handle)

    def read(self) -> dict[str, Any]:
        """run.json. Raises WeftError."""
        try:
            data = json.loads(self.record.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise WeftError(f"{self.record} cannot be read: {error}") from None
        if not isinstance(data, dict) or not isinstance(data.get("config"), dict):
            raise WeftError(f"{self.record} is no file of weft train.")
        return data

    def begin(
        self, config: RunConfig, identity: Mapping[str, Any], facts: Mapping[str, Any]
    ) -> tuple[Path, int] | None:
        """Write what is known before the first step; the checkpoint to go on from, and its step,
        where there is one.

        Raises ConfigError where the directory's run had other data, another model or other trained
        tensors.
        """
        for left in self.root.glob(
            ".*.tmp"
        ):  # of a run that was killed while it wrote; this one is alone here
            left.unlink()
        found = None
        begun = []
        if self.record.is_file():
            before = self.read()
            check_same(before["identity"], identity, self.root)
            found, begun = newest(self.checkpoints), before["sessions"]
        record = {
            "schema": SCHEMA,
            "status": "running",
            "identity": identity,
            **facts,
            "sessions": [*begun, {"from_step": found[1] if found else 0, **_surroundings()}],
            "config": to_dict(config),
        }
        self.write(record)  # first, so that a run that is killed now can be gone on with
        self.put("config.yaml", dump(config))
        self.checkpoints.mkdir(exist_ok=True)
        self._cut_log(found[1] if found else 0)
        return found

    def finish(self, **result: Any) -> None:
        """Add the result to run.json."""
        self.write({**self.read(), **result})

    def write(self, record: Mapping[str, Any]) -> None:
        self.put("run.json", json.dumps(record, indent=1) + "\n")

    def put(self, name: str, text: str) -> None:
        """A file, whole or not at all."""
        files.replace(self.root / name, lambda path: path.write_text(text, encoding="utf-8"))

    def log(self, row: Mapping[str, Any]) -> None:
        """Append one line."""
        plain = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in row.items()
        }
        with (self.root / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(plain) + "\n")  # JSON has no NaN

    def rows(self) -> list[dict[str, Any]]:
        """The log; a line that was cut off by a kill is left out."""
        path = self.root / "log.jsonl"
        found = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            with suppress(ValueError):
                found.append(json.loads(line))
        return found

    def _cut_log(self, step: int) -> None:
        """What was logged behind the checkpoint will be logged again."""
        kept = [row for row in self.rows() if row["step"] <= step]
        self.put("log.jsonl", "".join(json.dumps(row) + "\n" for row in kept))


def versions() -> dict[str, str]:
    """Of the packages that decide what a run computes; those that are not installed are left
    out.
    """
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _surroundings() -> dict[str, Any]:
    import torch

    from .. import __version__

    device = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    )
    return {
        "versions": {**versions(), "weft": __version__},
        "device": device,
        "threads": torch.get_num_threads(),
    }
