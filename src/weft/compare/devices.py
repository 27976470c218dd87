"""The cores and GPUs that a comparison may use."""

from __future__ import annotations

import os

import torch

from ..errors import ConfigError

# Parameters. Below SMALL, two single-threaded runs side by side are faster than one run on two
# threads; below TINY, launching a kernel on a GPU takes longer than running it.
SMALL, TINY = 20_000_000, 1_000_000
WORKER_LIMIT = 16  # each has its own copy of the model and the libraries, about 0.5 GB


def cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def visible_gpus() -> list[str]:
    """Returns the CUDA devices that torch sees, as CUDA_VISIBLE_DEVICES names them."""
    count = torch.cuda.device_count()
    named = [
        name.strip()
        for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        if name.strip()
    ]
    return (named or [str(number) for number in range(count)])[:count]


def check_device(device: str) -> None:
    """Raises ConfigError if CUDA was requested and is not available."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no CUDA device here. See `weft doctor`.")


def choose_device(requested: str, parameters: int) -> torch.device:
    """Returns the device of a model with this many parameters.

    "auto" is CUDA if it is available and the model is large enough to be faster there. Raises
    ConfigError if CUDA was requested and is not available.
    """
    check_device(requested)
    faster = torch.cuda.is_available() and parameters >= TINY
    return torch.device(
        "cuda" if requested == "cuda" or (requested == "auto" and faster) else "cpu"
    )


def worker_count(requested: int | None, device: str, parameters: int, gpus: int) -> int:
    """Returns the number of worker processes.

    On GPUs one per GPU. On the CPU one per core for small models, each with one thread; otherwise
    one that uses all cores.
    """
    if requested is not None:
        return requested
    if device == "cuda":
        return max(1, gpus)
    return 1 if parameters >= SMALL else min(cores(), WORKER_LIMIT)
