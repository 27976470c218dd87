"""The Triton kernels beside float64: the checks of tests/ops/kernel_checks.py, counted."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from time import perf_counter
from typing import Any

from ..memory import ROOT
from ..setup import Setup
from ..timing import Rounds

ALL = "kernel_checks"


def measure(setup: Setup, contenders: tuple[str, ...], rounds: Rounds) -> dict[str, Any]:
    """Metrics: passed and failed (checks), seconds; run once. A contender is `ALL`, or a word in
    the names of the checks to run. On the CPU the kernels run in Triton's interpreter.

    Raises RuntimeError if no check ran, or if one was skipped.
    """
    samples, notes = {}, []
    for name in contenders:
        started = perf_counter()
        passed, failed, last = _run("" if name == ALL else name, setup.device)
        notes.append(f"{name} on {setup.device}: {last}")
        samples[name] = {
            "passed": [float(passed)],
            "failed": [float(failed)],
            "seconds": [perf_counter() - started],
        }
    return {"samples": samples, "notes": notes}


def _run(word: str, device: str) -> tuple[int, int, str]:
    """Passed, failed, and pytest's last line."""
    done = process(word, {"TRITON_INTERPRET": "1"} if device == "cpu" else {})
    lines = done.stdout.strip().splitlines()
    last = lines[-1] if lines else ""
    counts = {kind: int(n) for n, kind in re.findall(r"(\d+) (passed|failed|error|skipped)", last)}
    failed = counts.get("failed", 0) + counts.get("error", 0)
    passed = counts.get("passed", 0)
    if not passed + failed or counts.get("skipped"):
        raise RuntimeError(f"the kernels were not checked: {last}\n{done.stderr[-1000:]}")
    return passed, failed, last


def process(word: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Runs the checks that have `word` in their names (all, if it is empty)."""
    checks = str(ROOT / "tests" / "ops" / "kernel_checks.py")
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", checks]
        + (["-k", word] if word else []),
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
