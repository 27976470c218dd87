"""Memory for the moment, the same for every layer: on a CPU the pages of fresh memory cost more
than many a pass over it.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

_rooms = threading.local()


def room(what: str, rows: int, columns: int, like: Tensor) -> Tensor:
    """[rows, columns] in the dtype of `like`, with whatever is in it, until somebody in this thread
    asks for `what` again.

    A thread keeps the largest of each kind: of a built W' that is one layer's weights. Other
    devices than the CPU have an allocator that keeps its pages, and get a new tensor.
    """
    if like.device.type != "cpu":
        return like.new_empty(rows, columns)
    name = f"{what} {like.dtype}"
    flat: Tensor | None = getattr(_rooms, name, None)
    if flat is None or flat.numel() < rows * columns:
        with torch.inference_mode(False):
            flat = torch.empty(rows * columns, dtype=like.dtype)
        setattr(_rooms, name, flat)
    return flat[: rows * columns].view(rows, columns)
