"""VeRA's frozen matrices as `peft` draws them from `projection_prng_key`, for reading files saved
without them.

peft (0.10 to 0.21) seeds one CPU generator of torch and draws A [r, in], then B [out, r], float32
and Kaiming-uniform. torch does not promise these bits for ever, which is why Weft's own draw is
another (counter.py); a test compares this one with the installed peft.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def peft_projections(seed: int, r: int, max_in: int, max_out: int) -> tuple[Tensor, Tensor]:
    """Float32 A [r, max_in] and B [max_out, r] on the CPU; the bound is sqrt(6 / fan_in)."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return _uniform(r, max_in, generator), _uniform(max_out, r, generator)


def _uniform(rows: int, fan_in: int, generator: torch.Generator) -> Tensor:
    # The same order of operations as peft's, since a bound that differs in its last bit moves every
    # number.
    bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(fan_in))
    return torch.empty(rows, fan_in, dtype=torch.float32, device="cpu").uniform_(
        -bound, bound, generator=generator
    )
