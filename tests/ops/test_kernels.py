"""The Triton kernels, in a process of their own, and what is said where they do not run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from weft.ops import kernels


def test_under_the_interpreter():
    """Triton decides when it is imported whether it interprets; where there is a GPU the kernels
    run on it instead.
    """
    pytest.importorskip("triton")
    where = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    checks = str(Path(__file__).with_name("kernel_checks.py"))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", checks],
        env={**os.environ, **where},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout


def test_why_the_torch_form_runs(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "GPUs" in str(kernels.why_not(torch.device("cpu"), torch.float32))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "float64" in str(kernels.why_not(torch.device("cpu"), torch.float64))
    monkeypatch.setenv("WEFT_TRITON", "0")
    assert "WEFT_TRITON=0" in str(kernels.why_not(torch.device("cpu"), torch.float32))
