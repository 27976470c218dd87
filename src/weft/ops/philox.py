"""Random numbers as a pure function of (seed, stream, row, column): Philox4x32-10 in integer tensor
operations.

A counter-based generator has no state, so an element has the same bits on every device and in every
order, whatever ran before, and a larger matrix contains the smaller one as its upper-left corner.
Only integer operations and one IEEE multiplication by a constant are used, so no library version
can change a bit. Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3",
SC 2011 (Philox, section 3.3).
"""

from __future__ import annotations

import hashlib
import struct

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MUL0, _MUL1 = 0xD2511F53, 0xCD9E8D57
_WEYL0, _WEYL1 = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
# Counters per band of rows, so that the int64 temporaries stay small: 2**20 are 8 MiB per tensor.
_BAND = 1 << 20


def key_of(*parts: object) -> int:
    """Returns a 64-bit key of any printable parts, by SHA-256: different parts give independent
    streams.
    """
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns ten rounds of Philox4x32 of four counters [...]; the key has 64 bits.

    The tensors are int64 and contain unsigned 32-bit values.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key & _MASK, (key >> 32) & _MASK
    for _ in range(_ROUNDS):
        # The 64-bit product wraps in int64 but keeps all its bits; the mask undoes the arithmetic
        # shift.
        p0, p1 = c0 * _MUL0, c2 * _MUL1
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL0) & _MASK, (k1 + _WEYL1) & _MASK
    return c0, c1, c2, c3


def bits(key: int, stream: int, rows: int, cols: int, device: torch.device | str = "cpu") -> Tensor:
    """Returns unsigned 32-bit values [rows, cols] as int64; element (i, j) depends only on key,
    stream, i and j.
    """
    blocks = (cols + 3) // 4
    out = torch.empty(rows, cols, dtype=torch.int64, device=device)
    band = max(1, _BAND // max(blocks, 1))
    column = torch.arange(blocks, dtype=torch.int64, device=device)
    for top in range(0, rows, band):
        row = torch.arange(top, min(top + band, rows), dtype=torch.int64, device=device)[:, None]
        c0 = column.expand(row.shape[0], blocks)
        c1 = row.expand(row.shape[0], blocks)
        four = philox((c0, c1, torch.full_like(c0, stream & _MASK), torch.zeros_like(c0)), key)
        out[top : top + band] = torch.stack(four, dim=-1).reshape(row.shape[0], blocks * 4)[
            :, :cols
        ]
    return out


def uniform(
    key: int, stream: int, rows: int, cols: int, bound: float, device: torch.device | str = "cpu"
) -> Tensor:
    """Returns float32 [rows, cols], uniform and symmetric in (-bound, bound), with the same bits
    everywhere.

    24 bits become an odd integer of magnitude below 2**24, which float32 represents exactly; one
    correctly rounded multiplication by a float32 constant gives the number. Zero never occurs.
    """
    if torch.device(device).type == "meta":
        return torch.empty(rows, cols, dtype=torch.float32, device=device)
    odd = (bits(key, stream, rows, cols, device) >> 8) * 2 + (1 - (1 << 24))
    step = struct.unpack("<f", struct.pack("<f", bound * 2.0**-24))[0]
    value: Tensor = odd.to(torch.float32) * step
    return value


def normal(
    key: int, stream: int, rows: int, cols: int, std: float, device: torch.device | str = "cpu"
) -> Tensor:
    """Returns float32 [rows, cols], Gaussian with standard deviation std, by the inverse
    distribution function.

    Computed in float64 on the CPU and rounded once. The last bit may depend on the mathematics
    library, so this is for tensors that are stored (LoRA's A), never for those that are redrawn
    from a seed.
    """
    if torch.device(device).type == "meta":
        return torch.empty(rows, cols, dtype=torch.float32, device=device)
    unit = ((bits(key, stream, rows, cols) >> 8).to(torch.float64) + 0.5) * 2.0**-24
    value: Tensor = torch.special.ndtri(unit) * std
    return value.to(torch.float32).to(device)
