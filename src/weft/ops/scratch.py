"""Scratch memory that all layers share: on a CPU the pages of fresh memory cost more than a pass
over it.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

_buffers = threading.local()


def scratch(name: str, rows: int, columns: int, like: Tensor) -> Tensor:
    """Returns [rows, columns] in the dtype of `like`, uninitialised, valid until this thread asks
    for `name` again.

    A thread keeps the largest of each name; for a built W' that is one layer's weights. On other
    devices than the CPU, whose allocators keep their pages, it is a new tensor.
    """
    if like.device.type != "cpu":
        return like.new_empty(rows, columns)
    key = f"{name} {like.dtype}"
    flat: Tensor | None = getattr(_buffers, key, None)
    if flat is None or flat.numel() < rows * columns:
        with torch.inference_mode(False):
            flat = torch.empty(rows * columns, dtype=like.dtype)
        setattr(_buffers, key, flat)
    return flat[: rows * columns].view(rows, columns)


def built(W: Tensor, A: Tensor, C: Tensor, sigma: Tensor | None = None) -> Tensor:
    """Returns σ ∘ (W + C A) [out, in] in scratch memory, for A [r, in], C [out, r] and σ [out].

    It is laid out as W is, so that one fast product reads both.
    """
    if not W.is_contiguous() and W.t().is_contiguous():
        out = scratch("W'", W.shape[1], W.shape[0], W)
        V = torch.addmm(W.t(), A.t(), C.t(), out=out).t()
    else:
        V = torch.addmm(W, C, A, out=scratch("W'", W.shape[0], W.shape[1], W))
    return V if sigma is None else V.mul_(sigma.to(V.dtype)[:, None])
