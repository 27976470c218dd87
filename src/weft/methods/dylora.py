"""DyLoRA: LoRA in which every smaller rank, from r_min on, is an adapter of its own.

    W' = W + s B A              y = x W'ᵀ + bias,   s = alpha / r                                 in evaluation
    y = x Wᵀ + s_b x A[:b]ᵀ B[:, :b]ᵀ + bias,       s_b = alpha / b,  b drawn from [r_min, r]     in training

    A [r, in]   trained, Gaussian (standard deviation 1/r) or Kaiming-uniform, as in LoRA
    B [out, r]  trained, starts at 0, so W' = W at step 0

Trained numbers per layer: r (in + out). b is a function of the seed and of the number of finished
optimiser steps, so micro-batches, recomputation, processes and a resumed run use the same b, and no
random generator is advanced; all layers of equal rank use the same b. If last_only=True, a step
moves only the b-th row of A and column of B (the paper's frozen variant), whatever momentum or
decay the optimiser would apply to the others. Otherwise the first b have gradients, and the
optimiser's momentum may move the others too, as in the authors' code. `adapter.truncate(b)` keeps
the first b ranks; truncating after loading gives the same. The result is the LoRA with A[:b], B[:,
:b] and alpha. In training the b ranks are selected by factors of x Aᵀ (s_b, and 0 beyond b), not by
slicing: a model is compiled once for all b, and the products cost those of rank r. Source:
arXiv:2210.07558, algorithm 1. alpha=None means that every s_b is 1. Raises ConfigError for invalid
values. Differs from the paper: b is uniform (as in its experiments); no other distribution is
supported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import ConfigError
from ..ops import philox
from ..ops.low_rank import LowRank
from .base import BaseLayer, Params, Shape, Shared
from .checks import check_alpha, check_choice
from .config import LowRankConfig, scaling
from .lora import LoRA
from .rng import Rng


@dataclass(frozen=True, kw_only=True)
class DyLoRA(LowRankConfig):
    """See the module's equation."""

    r_min: int = 1
    alpha: float | None = None
    init: str = "gaussian"
    last_only: bool = False

    learning_rates: ClassVar[tuple[float, ...]] = (3e-3, 1e-2, 3e-2)
    nested: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.r_min <= self.r:
            raise ConfigError(
                f"{type(self).__name__}(r={self.r}, r_min={self.r_min}): r_min must be a whole number "
                "from 1 to r."
            )
        check_alpha(self)
        check_choice(self, "init", ("gaussian", "kaiming"))

    @property
    def scale(self) -> float:
        """s in the equation."""
        return scaling(self.r, self.alpha)

    @property
    def audit_after(self) -> int:
        """The number of steps after which both A and B have moved, or 0 without last_only.

        With last_only, A moves only after the same b has been drawn twice.
        """
        return self.r - self.r_min + 3 if self.last_only else 0

    def rank_at(self, step: int) -> int:
        """Returns b of the training step after `step` finished ones."""
        word = int(philox.bits(philox.key_of(self.seed, "rank"), step, 1, 1))
        return self.r_min + word % (self.r - self.r_min + 1)

    def truncated(self, r: int) -> DyLoRA:
        return replace(self, r=min(r, self.r), r_min=min(r, self.r_min))

    def factors(self, p: Params, training: bool = False) -> LowRank:
        if not training:
            return LowRank(p.A, p.B, s=self.scale)
        return LowRank(p.A, p.B, d=self._scales(p.b))

    def _scales(self, b: Tensor) -> Tensor:
        """Returns [r]: s_b for the first b ranks, and 0 beyond. b is a tensor, so no compiled graph
        depends on its value.
        """
        # alpha / b may not be exact in float32, but MPS has no float64
        dtype = torch.float32 if b.device.type == "mps" else torch.float64
        scale = torch.ones_like(b, dtype=dtype) if self.alpha is None else self.alpha / b.to(dtype)
        return torch.where(torch.arange(self.r, device=b.device) < b, scale, 0.0)

    def shapes(self, out: int, in_: int) -> dict[str, Shape]:
        return {"A": (self.r, in_), "B": (out, self.r)}

    def initial(self, layer: BaseLayer, rng: Rng, shared: Shared | None) -> dict[str, Tensor]:
        """Returns A [r, in] and B [out, r] as LoRA draws them."""
        return LoRA(r=self.r, init=self.init).initial(layer, rng, shared)

    def buffers(self, out: int, in_: int, device: torch.device) -> dict[str, Tensor]:
        """Returns `step` [] and the rank `b` [] of the next step."""
        return {
            "step": torch.zeros((), dtype=torch.int64, device=device),
            "b": torch.full((), self.rank_at(0), dtype=torch.int64, device=device),
        }

    @property
    def follows_steps(self) -> bool:
        return self.r_min < self.r or self.last_only

    def before_step(self, layers: Mapping[str, Any], grad_scale: float, repeated: bool) -> None:
        for p in layers.values() if self.last_only else ():
            others = self._others(p)
            if not repeated:
                p.held = p.A.detach().clone(), p.B.detach().clone()
            for tensor, place in ((p.A, others), (p.B, (slice(None), others))):
                if tensor.grad is not None:
                    tensor.grad[place] = 0.0

    def after_step(self, layers: Mapping[str, Any]) -> None:
        step = 1 + max(int(p.step) for p in layers.values())
        for p in layers.values():
            if self.last_only:
                others, (A, B) = self._others(p), p.held
                p.A[others], p.B[:, others] = A[others], B[:, others]
                del p.held
            p.step.fill_(step)
            p.b.fill_(p.method.rank_at(step))

    @staticmethod
    def _others(p: Any) -> Tensor:
        """Returns [r]: True for all ranks but the b-th."""
        others: Tensor = torch.arange(p.method.r, device=p.A.device) != p.b - 1
        return others
