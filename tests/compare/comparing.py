"""Runs of `weft compare` for the tests: real ones, with a tiny budget."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weft.cli import main

# Two methods and three seeds: twelve training runs of eight steps.
TINY = ("--methods", "lora:r=3:alpha=5,bitfit", "--budget", "steps=96,batch=12,validation=60,test=150",
        "--lr", "lora=1e-2", "--lr", "bitfit=3e-3,1e-2")
RUNS = 12


@dataclass(frozen=True)
class Finished:
    """What a run of the command said and left."""

    status: int
    printed: str
    errors: str
    out: Path

    @property
    def json(self) -> dict[str, Any]:
        return json.loads((self.out / "results.json").read_text(encoding="utf-8"))

    @property
    def runs(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (self.out / "runs").iterdir()}


def weft_command(*words: str) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of the command, run in this process."""
    printed, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
        status = main(list(words))
    return status, printed.getvalue(), errors.getvalue()


def compare(out: Path, *words: str) -> Finished:
    """`weft compare` in this process; its workers are processes of their own all the same."""
    return Finished(*weft_command("compare", "--out", str(out), *words), out=out)
