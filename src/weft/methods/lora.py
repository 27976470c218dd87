"""LoRA: a trained product of two thin matrices beside the frozen weight.

    W' = W + s B A              y = x W'ᵀ + bias,   s = alpha / r   (rslora: s = alpha / sqrt(r))

    A [r, in]   trained, Gaussian with standard deviation 1/r (init="gaussian", as the paper's text and figure have it)
                or Kaiming-uniform with bound 1/sqrt(in) (init="kaiming", as the authors' code has it)
    B [out, r]  trained, starts at 0, so W' = W at step 0

Trained numbers per layer: r (in + out). Dropout acts on x of the low-rank branch only. On an
embedding the start is reversed as in the authors' code: A is 0 and B is Gaussian with standard
deviation 1 (init="kaiming") or 1/r. Dtype: float32 unless asked. Raises ConfigError for values that
cannot be meant. Source: arXiv:2106.09685, section 4.1; rslora: arXiv:2312.03732, theorem 3.2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..ops import low_rank
from ..ops.factors import Factors
from .base import (
    Draw,
    Host,
    Params,
    Shape,
    Shared,
    check_choice,
    check_common,
    check_number,
    check_rank,
    wide,
)


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """See the module's equation. alpha=None means alpha = r, that is s = 1 whatever r a layer
    has.
    """

    r: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    init: str = "gaussian"
    rslora: bool = False
    targets: Any = "all-linear"
    modules_to_save: tuple[str, ...] = ()
    train: tuple[str, ...] = ()
    selection: ClassVar[tuple[str, ...]] = ()
    seed: int = 0
    dtype: str = "float32"

    mergeable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_rank(self)
        if self.alpha is not None:
            check_number(self, "alpha", low=0.0, open_low=True)
        check_choice(self, "init", ("gaussian", "kaiming"))
        check_common(self)

    @property
    def scale(self) -> float:
        """s in the equation."""
        alpha = float(self.r if self.alpha is None else self.alpha)
        return alpha / math.sqrt(self.r) if self.rslora else alpha / self.r

    def delta(self, p: Params, dtype: torch.dtype = torch.float32) -> Tensor:
        product: Tensor = p.B.to(dtype) @ p.A.to(dtype)
        return self.scale * product

    def update(self, x: Tensor, host: Host, p: Params, dtype: torch.dtype) -> Tensor:
        h = host.project(x, p.A, self.dropout, p.training, dtype)
        return low_rank.up(h, p.B.to(dtype), self.scale)

    def factors(self, host: Host, p: Params, x: Tensor | None = None) -> Factors:
        return Factors(p.A, p.B, s=self.scale, dropout=self.dropout if p.training else 0.0)

    def effective_weight(self, W: Tensor, p: Params) -> Tensor:
        W = wide(W)
        return W + self.delta(p, W.dtype)

    def forward(self, x: Tensor, y: Tensor, host: Host, p: Params) -> Tensor:
        return y + self.update(x, host, p, y.dtype)

    def trained(self, out: int, in_: int) -> dict[str, Shape]:
        return {"A": (self.r, in_), "B": (out, self.r)}

    def start(self, host: Host, draw: Draw, shared: Shared | None) -> dict[str, Tensor]:
        out, in_, device = host.out_features, host.in_features, host.weight().device
        gaussian = self.init == "gaussian"
        if host.kind == "embedding":
            B = draw.normal("B", (out, self.r), 1 / self.r if gaussian else 1.0, device)
            return {"A": torch.zeros(self.r, in_, dtype=torch.float32, device=device), "B": B}
        if gaussian:
            A = draw.normal("A", (self.r, in_), 1 / self.r, device)
        else:
            A = draw.uniform("A", (self.r, in_), 1 / math.sqrt(in_), device)
        return {"A": A, "B": torch.zeros(out, self.r, dtype=torch.float32, device=device)}

    def share(self, shapes: Sequence[tuple[int, int]], device: torch.device) -> None:
        return None

    def share_key(self) -> None:
        return None
