"""Layout of a run directory.

* config.yaml: the resolved configuration, defaults included
* run.json: versions, seeds, fingerprints of model and data, result
* log.jsonl: one line per logged step or evaluation
* tokenizer/: the run's tokenizer with its chat template, or its image processor
* adapter/: the result, in the format of weft.save, with the tokenizer; best/: the adapter of the best evaluation
  (eval.best)
* curves.png: loss, rate, gradient norm, evaluations; README.md: the model card
* checkpoints/: for --resume
"""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import sys
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

from torch import nn

from ..auditing.base_digest import base_digests, base_fingerprint
from ..checkpoint import files
from ..checkpoint.tokenizer_files import RUN_TOKENIZER
from ..errors import ConfigError, WeftError
from .config.read import dump, to_dict
from .config.sections import RunConfig
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
        """The folder of the checkpoints."""
        return self.root / "checkpoints"

    @property
    def adapter(self) -> Path:
        """The folder of the resulting adapter."""
        return self.root / "adapter"

    @property
    def best(self) -> Path:
        """The folder of the adapter of the best evaluation."""
        return self.root / "best"

    @property
    def record(self) -> Path:
        """run.json."""
        return self.root / "run.json"

    def check(self, config: RunConfig, go_on: bool) -> None:
        """Raises ConfigError unless a run may begin here, or with go_on be resumed. Nothing is
        loaded.
        """
        folder = next(
            path for path in (self.root.absolute(), *self.root.absolute().parents) if path.exists()
        )
        if not folder.is_dir():
            raise ConfigError(f"out={str(self.root)!r}: {folder} is a file; give a directory.")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise ConfigError(
                f"out={str(self.root)!r}: {folder} is not writable. Give another directory."
            )
        exists = self.record.is_file()
        if exists and not go_on:
            raise ConfigError(
                f"out={str(self.root)!r} has a run. Add --resume to resume it, or give another out."
            )
        if exists:
            check_config(self.read()["config"], to_dict(config), self.root)
        elif go_on:
            raise ConfigError(
                f"out={str(self.root)!r} has no run to resume. Leave --resume out to begin one "
                "there, or give the out of the run to resume."
            )
        elif self.root.is_dir() and any(
            not path.name.startswith(".") for path in self.root.iterdir()
        ):
            raise ConfigError(
                f"out={str(self.root)!r} is not empty and has no run. Give a new directory."
            )

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Locks the directory against other processes that train. The system frees the lock of a
        killed process.

        Raises ConfigError if another process has the lock.
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
                "another out."
            ) from None
        except OSError as error:  # a file system without locks
            warnings.warn(
                f"out={str(self.root)!r} cannot be locked ({error}), so a second run in it would not "
                "be noticed. Start only one.",
                stacklevel=3,
            )
        try:
            yield
        finally:
            os.close(handle)

    def read(self) -> dict[str, Any]:
        """Returns run.json. Raises WeftError if it cannot be read."""
        try:
            data = json.loads(self.record.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise WeftError(f"{self.record} cannot be read: {error}") from None
        if not isinstance(data, dict) or not isinstance(data.get("config"), dict):
            raise WeftError(f"{self.record} is not a file of weft train.")
        return data

    def rendered_at(self) -> datetime | None:
        """Returns the time in the samples of the run here, if its chat template prints the date."""
        found = self.read().get("rendered_at") if self.record.is_file() else None
        return None if found is None else datetime.fromisoformat(found)

    def begin(
        self, config: RunConfig, identity: Mapping[str, Any], facts: Mapping[str, Any]
    ) -> tuple[Path, int] | None:
        """Writes the record before the first step. Returns the checkpoint to resume from, and its
        step, or None.

        Raises ConfigError if the directory's run has other data, another model or other trained
        tensors.
        """
        for left in self.root.glob(".*.tmp"):  # of a run that was killed in a write
            left.unlink()
        found = None
        begun, kept = [], {}
        if self.record.is_file():
            before = self.read()
            check_same(before["identity"], identity, self.root)
            found, begun = newest(self.checkpoints), before["sessions"]
            kept = {key: before[key] for key in ("unreached",) if key in before}
        record = {
            "schema": SCHEMA,
            "status": "running",
            "identity": identity,
            **facts,
            **kept,
            "sessions": [*begun, {"from_step": found[1] if found else 0, **_environment()}],
            "config": to_dict(config),
        }
        self._put_record(record)  # first, so that a run that is killed now can be resumed
        self.put("config.yaml", dump(config))
        self.checkpoints.mkdir(exist_ok=True)
        self._cut_log(found[1] if found else 0)
        return found

    def finish(self, **result: Any) -> None:
        """Adds the result to run.json."""
        self._put_record({**self.read(), **result})

    def report_unreached(self, stream: TextIO, modules: list[str], steps: int) -> None:
        """Prints the modules and weights that gradients hardly reached, and adds them to run.json."""
        print(
            f"audit: in the first {steps} steps gradients reached {len(modules)} modules never or "
            "more rarely than others (their input was zero, or audit.unreached=allow accepts it): "
            f"{', '.join(modules[:8])}"
            f"{', ...' if len(modules) > 8 else ''}",
            file=stream,
            flush=True,
        )
        self.finish(unreached=modules)

    def _put_record(self, record: Mapping[str, Any]) -> None:
        self.put("run.json", json.dumps(record, indent=1) + "\n")

    def put(self, name: str, text: str) -> None:
        """Writes a file, whole or not at all."""
        files.replace(self.root / name, lambda path: path.write_text(text, encoding="utf-8"))

    def log(self, row: Mapping[str, Any]) -> None:
        """Appends one line to log.jsonl."""
        plain = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in row.items()
        }
        with (self.root / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(plain) + "\n")  # JSON has no NaN

    def put_tokenizer(self, tokenizer: Any) -> None:
        """Writes the tokenizer that the data is rendered with, for all adapters of the run."""
        target, fresh = self.root / RUN_TOKENIZER, self.root / f".{RUN_TOKENIZER}-new"
        shutil.rmtree(fresh, ignore_errors=True)  # of a run that was killed here
        tokenizer.save_pretrained(fresh)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(fresh, target)

    def rows(self) -> list[dict[str, Any]]:
        """Returns the rows of log.jsonl, without a line that was cut off by a kill."""
        path = self.root / "log.jsonl"
        found = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            with suppress(ValueError):
                found.append(json.loads(line))
        return found

    def _cut_log(self, step: int) -> None:
        """Removes the rows after the checkpoint, which will be logged again."""
        kept = [row for row in self.rows() if row["step"] <= step]
        self.put("log.jsonl", "".join(json.dumps(row) + "\n" for row in kept))


def check_recorded_base(
    model: nn.Module, missing: Collection[str], adapters: Iterable[Path]
) -> None:
    """Raises WeftError if one of these adapters is in the directory of a run with another base than
    `model`, which has no adapter yet.

    `missing`: names of its tensors that are in no checkpoint. An adapter in no run's directory
    passes.
    """
    mine = base_fingerprint(base_digests(model), missing)
    for adapter in adapters:
        run = files.run_of(adapter)
        if run is None:
            continue
        theirs = RunDir(run).read().get("identity", {}).get("model")
        if theirs not in (None, mine):
            raise WeftError(
                f"{str(adapter)!r} was trained on a base whose weights have checksum {theirs}, and "
                f"those of this model have {mine}. Give the base that the run names (config.yaml "
                "beside it), in the dtype that it had there (--dtype, model.dtype)."
            )


def versions() -> dict[str, str]:
    """Returns the versions of the installed packages on which a run's results depend."""
    result = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            result[name] = metadata.version(name)
    return result


def _environment() -> dict[str, Any]:
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
