"""The processes of one run, started by `torchrun` or `accelerate launch`. A single process never
waits.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any


def count() -> int:
    """Returns the number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def first() -> bool:
    """Whether this is the process that writes the run's files and prints."""
    return int(os.environ.get("RANK", "0")) == 0


def wait(device: str) -> None:
    """Waits until all processes have called this."""
    if count() > 1:
        _state(device).wait_for_everyone()


@cache
def _state(device: str) -> Any:
    from accelerate import PartialState

    return PartialState(cpu=True, backend="gloo") if device == "cpu" else PartialState()


def any_of(value: bool, device: Any) -> bool:
    """Whether the value is True in any of the processes."""
    import torch

    result = torch.tensor(int(value), device=device)
    torch.distributed.all_reduce(result, torch.distributed.ReduceOp.MAX)
    return bool(result)
