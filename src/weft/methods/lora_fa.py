"""LoRA-FA: LoRA with A frozen at its random start, so that only B trains and no input has to be
kept.

    W' = W + s B A              y = x W'ᵀ + bias,   s = alpha / r   (rslora: s = alpha / sqrt(r))

    A [r, in]   frozen, Kaiming-uniform with bound 1/sqrt(in) (1 on an embedding), from `seed` and the layer's name
    B [out, r]  trained, starts at 0, so W' = W at step 0

Trained numbers per layer: r out. For backward only h = x Aᵀ is kept, r numbers per token, also with
dropout (ops/projection.py). A is in no file, only a checksum that is compared on loading: its bits
are the same everywhere. precondition=True multiplies B's gradient by (1/s)² (A Aᵀ)⁻¹ before every
step, which then changes W' most like full fine-tuning (the method's later version, as in peft's
LoraFAOptimizer, with its 1e-8 on A Aᵀ). Source: arXiv:2308.03303, section 3. Differs: A is uniform,
as Gaussian bits are not reproduced everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..ops.low_rank import LowRank
from ..ops.norm import at_least_float32
from .base import BaseLayer, Params, Shape, Shared
from .config import ScaledConfig
from .rng import Rng


@dataclass(frozen=True, kw_only=True)
class LoRAFA(ScaledConfig):
    """See the module's equation."""

    precondition: bool = False

    learning_rates: ClassVar[tuple[float, ...]] = (3e-3, 1e-2, 3e-2)

    def factors(self, p: Params, training: bool = False) -> LowRank:
        return LowRank(p.A, p.B, s=self.scale)

    def shapes(self, out: int, in_: int) -> dict[str, Shape]:
        return {"B": (out, self.r)}

    def initial(self, layer: BaseLayer, rng: Rng, shared: Shared | None) -> dict[str, Tensor]:
        """Returns B [out, r], zero."""
        return {"B": rng.full((layer.out_features, self.r))}

    def frozen(self, out: int, in_: int, takes_ids: bool, rng: Rng) -> dict[str, Tensor]:
        """Returns A [r, in]."""
        bound = 1.0 if takes_ids else 1 / math.sqrt(in_)
        return {"A": rng.without_nesting().uniform("A", (self.r, in_), bound)}

    @property
    def follows_steps(self) -> bool:
        return self.precondition

    def before_step(self, layers: Mapping[str, Any], grad_scale: float, repeated: bool) -> None:
        for p in layers.values() if self.precondition else ():
            if p.B.grad is not None:
                A = at_least_float32(p.A)
                gram = A @ A.t() + 1e-8 * torch.eye(len(A), dtype=A.dtype, device=A.device)
                inverse = torch.linalg.pinv(gram, hermitian=True) / p.method.scale**2
                p.B.grad.copy_(at_least_float32(p.B.grad) @ inverse)
