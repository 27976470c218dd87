"""VeRA's frozen pair A [r, max_in] and B [max_out, r]: one module, shared by every layer of an adapter."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from ..ops import counter
from ..ops.peft_draw import peft_projections
from .base import Shared

_STREAM_A, _STREAM_B = 0, 1


class Projections(Shared):
    """A and B as buffers that are never saved with the model and never trained.

    A cast to bfloat16 and back would lose bits for ever, so on a change of dtype, or on leaving the meta device, the
    matrices are drawn again from the seed and then cast. Stored matrices cannot be redrawn; they are cast.
    """

    A: Tensor
    B: Tensor

    def __init__(self, r: int, max_in: int, max_out: int, seed: int, draw: str,
                 device: torch.device | str = "cpu", stored: tuple[Tensor, Tensor] | None = None) -> None:
        super().__init__()
        self.r, self.max_in, self.max_out, self.seed, self.draw = r, max_in, max_out, seed, draw
        if draw == "stored" and stored is None:
            raise ConfigError('VeRA(draw="stored"): the matrices come from a file only; load one with weft.load, or '
                              'choose draw="weft".')
        A, B = stored if stored is not None else self._drawn(torch.device(device))
        self.register_buffer("A", A, persistent=False)
        self.register_buffer("B", B, persistent=False)

    def _drawn(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Float32 A [r, max_in] and B [max_out, r], Kaiming-uniform with gain sqrt(2): bound sqrt(6 / fan_in)."""
        if device.type == "meta":
            return torch.empty(self.r, self.max_in, device=device), torch.empty(self.max_out, self.r, device=device)
        if self.draw == "peft":
            A, B = peft_projections(self.seed, self.r, self.max_in, self.max_out)
            return A.to(device), B.to(device)
        A = counter.uniform(self.seed, _STREAM_A, self.r, self.max_in, math.sqrt(6 / self.max_in), device)
        B = counter.uniform(self.seed, _STREAM_B, self.max_out, self.r, math.sqrt(6 / self.r), device)
        return A, B

    def pool_key(self) -> tuple[Any, ...] | None:
        if self.draw == "stored" or self.A.dtype != torch.float32:
            return None
        return ("projections", self.r, self.seed, self.draw), self.max_out, self.max_in, self.A.device

    def checksum(self) -> str:
        """16 hex digits of SHA-256 over the float32 bits of A and B, whatever dtype they are held in."""
        A, B = (self.A, self.B) if self.draw == "stored" else self._drawn(torch.device("cpu"))
        digest = hashlib.sha256()
        for t in (A, B):
            digest.update(t.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        dtype, device = self.A.dtype, self.A.device
        super()._apply(fn, recurse)
        redraw = self.A.dtype != dtype or (device.type == "meta" and self.A.device.type != "meta")
        if redraw and self.draw != "stored":
            A, B = self._drawn(self.A.device)
            self.A, self.B = A.to(self.A.dtype), B.to(self.B.dtype)
        return self

    def extra_repr(self) -> str:
        return f"r={self.r}, max_in={self.max_in}, max_out={self.max_out}, seed={self.seed}, draw={self.draw!r}"
