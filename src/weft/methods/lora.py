"""LoRA: a trained product of two thin matrices beside the frozen weight.

    W' = W + s B A              y = x W'ᵀ + bias,   s = alpha / r   (rslora: s = alpha / sqrt(r))

    A [r, in]   trained, Gaussian with standard deviation 1/r (init="gaussian", as in the paper)
                or Kaiming-uniform with bound 1/sqrt(in) (init="kaiming", as in the authors' code)
    B [out, r]  trained, starts at 0, so W' = W at step 0
    init="pissa", "olora": A and B start at a part of W, and ΔW = s (B A - B0 A0): starts.py

Trained numbers per layer: r (in + out). Dropout acts on x of the low-rank branch only. On an
embedding A starts at 0 and B is Gaussian with standard deviation 1 (init="kaiming") or 1/r, as in
the authors' code. Raises ConfigError if a value is out of range. Source: arXiv:2106.09685, section
4.1; rslora: arXiv:2312.03732, theorem 3.2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..ops.low_rank import LowRank
from .base import BaseLayer, Params, Shape, Shared
from .checks import check_choice
from .config import ScaledConfig
from .rng import Rng
from .starts import OF_WEIGHT, FromWeight, moved


@dataclass(frozen=True, kw_only=True)
class LoRA(FromWeight, ScaledConfig):
    """See the module's equation."""

    init: str = "gaussian"
    learning_rates: ClassVar[tuple[float, ...]] = (3e-3, 1e-2, 3e-2)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "init", ("gaussian", "kaiming", *OF_WEIGHT))

    def factors(self, p: Params, training: bool = False) -> LowRank:
        if self.starts_at_weight:
            return moved(p.A, p.B, p.A0, p.B0, self.scale, training)
        return LowRank(p.A, p.B, s=self.scale)

    def shapes(self, out: int, in_: int) -> dict[str, Shape]:
        return {"A": (self.r, in_), "B": (out, self.r)}

    def initial(self, layer: BaseLayer, rng: Rng, shared: Shared | None) -> dict[str, Tensor]:
        if self.starts_at_weight:
            return self.at_weight(layer.weight().detach(), rng.name)
        A, B = (self.r, layer.in_features), (layer.out_features, self.r)
        gaussian = self.init == "gaussian"
        if layer.takes_ids:
            return {"A": rng.full(A), "B": rng.normal("B", B, 1 / self.r if gaussian else 1.0)}
        if gaussian:
            return {"A": rng.normal("A", A, 1 / self.r), "B": rng.full(B)}
        return {"A": rng.uniform("A", A, 1 / math.sqrt(layer.in_features)), "B": rng.full(B)}
