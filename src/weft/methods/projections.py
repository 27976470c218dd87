"""VeRA's frozen pair A [r, max_in] and B [max_out, r]: one module, shared by every layer of an
adapter.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from ..ops import counter
from ..ops.derived import Derived, counts
from ..ops.peft_draw import peft_projections
from .base import Shared

_STREAM_A, _STREAM_B = 0, 1


class Projections(Shared):
    """A and B as buffers that are never saved with the model and never trained.

    A cast to bfloat16 and back would lose bits for ever, and `to_empty` fills them with whatever
    the memory holds. So whenever the model's tensors are replaced (`to`, `half`, `to_empty`, ...)
    the matrices are made again: drawn from the seed, or taken from the float32 pair that a file
    brought, and then cast.
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
        self.derived = Derived()
        self._last: tuple[Any, tuple[Any, ...], Tensor] | None = None
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
        """Float32 A [r, max_in] and B [max_out, r], Kaiming-uniform with gain sqrt(2): bound sqrt(6
        / fan_in).
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
        A = counter.uniform(
            self.seed, _STREAM_A, self.r, self.max_in, math.sqrt(6 / self.max_in), device
        )
        B = counter.uniform(
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

    def project(self, x: Tensor, A: Tensor, detached: bool) -> Tensor:
        """x Aᵀ [..., r] for a view A of this A, once for all layers that read the same x, with or
        without its gradient.

        The last product is kept until x is gone, or has been written to, or a backward pass has
        gone through the product.
        """
        key = (
            x._version if not x.is_inference() else None,
            A.data_ptr(),
            A._version,
            A.shape,
            A.dtype,
            detached,
            torch.is_grad_enabled(),
            threading.get_ident(),
        )
        if (
            self._last is not None
            and self._last[0]() is x
            and self._last[1] == key
            and key[0] is not None
        ):
            return self._last[2]
        counts["A x"] += 1
        h = torch.nn.functional.linear(x.detach() if detached else x, self._cast(A, x.dtype))
        read = weakref.ref(x, self._forget)
        self._last = (read, key, h)
        if h.requires_grad:  # a backward pass frees its graph, and x may be read again after it
            h.register_hook(lambda grad: self._forget(read))  # type: ignore[no-untyped-call]
        return h

    def _cast(self, A: Tensor, dtype: torch.dtype) -> Tensor:
        if A.dtype == dtype:
            return A
        narrow: Tensor = self.derived.get(f"A in {dtype}", (), (self.A,), lambda: self.A.to(dtype))
        return narrow[:, : A.shape[1]]

    def _forget(self, gone: Any) -> None:
        if self._last is not None and self._last[0] is gone:
            self._last = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None}

    def checksum(self) -> str:
        """16 hex digits of SHA-256 over the float32 bits of A and B, whatever dtype they are held
        in.
        """
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
