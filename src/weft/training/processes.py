"""The processes of one run, as `torchrun` and `accelerate launch` start them; alone there is one,
and nothing waits.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any


def count() -> int:
    """How many there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def first() -> bool:
    """This one writes the run's files and speaks."""
    return int(os.environ.get("RANK", "0")) == 0


def wait(device: str) -> None:
    """Until all of them have come here."""
    if count() > 1:
        _state(device).wait_for_everyone()


@cache
def _state(device: str) -> Any:
    from accelerate import PartialState

    return PartialState(cpu=True, backend="gloo") if device == "cpu" else PartialState()


def any_of(asked: bool, device: Any) -> bool:
    """Whether it was asked of any of them."""
    import torch

    told = torch.tensor(int(asked), device=device)
    torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX)
    return bool(told)
