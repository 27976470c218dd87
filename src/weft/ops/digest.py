"""Two numbers that tell whether the bits of a tensor have changed."""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 1 << 22  # words at a time, so that a large tensor needs no copies of its size


def digest(t: Tensor) -> tuple[int, int]:
    """Returns two wrapping sums over the bits of t [...]. They change if any one element changes or
    any two elements are exchanged.
    """
    if t.numel() == 0 or t.is_meta:
        return (0, t.numel())
    flat = t.detach().contiguous().reshape(-1)
    whole = flat.numel() * flat.element_size() // 8 * 8
    raw = flat.view(torch.uint8)
    aligned = raw.storage_offset() % 8 == 0
    words = (raw[:whole] if aligned else raw[:whole].clone()).view(torch.int64)
    tail = raw[whole:].to(torch.int64)
    plain = tail.sum()
    weighted = (tail * torch.arange(1, tail.numel() + 1, device=t.device)).sum()
    for start in range(0, words.numel(), _CHUNK):
        chunk = words[start : start + _CHUNK]
        odd = torch.arange(chunk.numel(), device=t.device, dtype=torch.int64) + start
        plain = plain + chunk.sum()
        weighted = weighted + (chunk * (odd * 2 + 1)).sum()
    return int(plain), int(weighted)
