"""VeRA's frozen pair A [r, max_in] and B [max_out, r]: one module, shared by every layer of an
adapter.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from ..ops import philox
from ..ops.input_cache import SharedDown
from ..ops.peft_draw import peft_projections
from .base import Shared

_STREAM_A, _STREAM_B = 0, 1


class Projections(Shared):
    """A [r, max_in] and B [max_out, r] as buffers that are never saved with the model and never
    trained.

    A cast to bfloat16 and back would lose bits, and `to_empty` leaves them uninitialised. So
    whenever the model's tensors are replaced (`to`, `half`, `to_empty`, ...), the matrices are
    recreated: drawn from the seed, or copied from the float32 pair of a file, and then cast.
    """

    A: Tensor
    B: Tensor

    def __init__(
        self,
        r: int,
        max_in: int,
        max_out: int,
        seed: int,
        draw: str,
        device: torch.device | str = "cpu",
        stored: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.down = SharedDown()  # x Aᵀ, once for all layers that read x
        self.r, self.max_in, self.max_out, self.seed, self.draw = r, max_in, max_out, seed, draw
        if draw == "stored" and stored is None:
            raise ConfigError(
                'VeRA(draw="stored"): the matrices come from a file only; load one with weft.load, '
                "or "
                'choose draw="weft".'
            )
        self._stored = (
            None if stored is None else (stored[0].detach().float(), stored[1].detach().float())
        )
        A, B = self._made(torch.device(device) if stored is None else stored[0].device)
        self.register_buffer("A", A, persistent=False)
        self.register_buffer("B", B, persistent=False)

    def _made(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Returns float32 A [r, max_in] and B [max_out, r], Kaiming-uniform with gain sqrt(2):
        bound sqrt(6 / fan_in).
        """
        if device.type == "meta":
            return (
                torch.empty(self.r, self.max_in, dtype=torch.float32, device=device),
                torch.empty(self.max_out, self.r, dtype=torch.float32, device=device),
            )
        if self._stored is not None:
            return self._stored[0].to(device), self._stored[1].to(device)
        if self.draw == "peft":
            A, B = peft_projections(self.seed, self.r, self.max_in, self.max_out)
            return A.to(device), B.to(device)
        A = philox.uniform(
            self.seed, _STREAM_A, self.r, self.max_in, math.sqrt(6 / self.max_in), device
        )
        B = philox.uniform(
            self.seed, _STREAM_B, self.max_out, self.r, math.sqrt(6 / self.r), device
        )
        return A, B

    def pool_key(self) -> tuple[Any, ...] | None:
        if self.draw == "stored" or self.A.dtype != torch.float32:
            return None
        return (
            ("projections", self.r, self.seed, self.draw),
            self.max_out,
            self.max_in,
            self.A.device,
        )

    def checksum(self) -> str:
        """Returns 16 hex digits of SHA-256 over A and B in float32, whatever their current dtype."""
        digest = hashlib.sha256()
        for t in self._made(torch.device("cpu")):
            t = t.contiguous()
            # The bytes by address: `.numpy()` would need numpy, which the core does without.
            digest.update(ctypes.string_at(t.data_ptr(), t.numel() * t.element_size()))
        return digest.hexdigest()[:16]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = self.A
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.A is not before:
            A, B = self._made(self.A.device)
            self.A, self.B = A.to(self.A.dtype), B.to(self.B.dtype)
        return self

    def extra_repr(self) -> str:
        return f"r={self.r}, max_in={self.max_in}, max_out={self.max_out}, seed={self.seed}, draw={self.draw!r}"
