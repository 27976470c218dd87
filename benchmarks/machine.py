"""Where and with what a benchmark ran."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .memory import ROOT

PACKAGES = ("torch", "transformers", "peft", "safetensors", "weft")


def machine() -> dict[str, Any]:
    """CPU model, cores that this process may use, torch's threads, RAM, system, the load before we
    came, and the GPU, if there is one.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": _cpu(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "ram": ram,
        "system": platform.system(),
        "load": round(os.getloadavg()[0], 2),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.partition(":")[2].strip()
            for line in info.read_text(encoding="utf-8").splitlines()
            if line.startswith("model name")
        ]
        if names:
            return f"{names[0]} ({platform.machine()})"
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Of the packages that matter, and the commit of Weft's checkout, marked where files have
    changed since.
    """
    found = {name: _version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **found, "commit": _commit()}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return str(getattr(__import__(name), "__version__", "unknown"))


def _commit() -> str:
    head, changed = (
        _git("rev-parse", "--short=10", "HEAD"),
        _git("status", "--porcelain", "--", "src", "benchmarks"),
    )
    if head is None:
        return "unknown"
    own = f"{Path('benchmarks') / 'results'}/"
    dirty = [line for line in (changed or "").splitlines() if own not in line]
    return head + ("-changed" if dirty else "")


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
