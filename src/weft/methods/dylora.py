"""DyLoRA: LoRA of which every smaller rank, from r_min on, is an adapter too.

    W' = W + s B A              y = x W'ᵀ + bias,   s = alpha / r                                 in evaluation
    y = x Wᵀ + s_b x A[:b]ᵀ B[:, :b]ᵀ + bias,       s_b = alpha / b,  b drawn from [r_min, r]     in training

    A [r, in]   trained, Gaussian (standard deviation 1/r) or Kaiming-uniform, as in LoRA
    B [out, r]  trained, starts at 0, so W' = W at step 0

Trained numbers per layer: r (in + out). b is a function of the seed and of the number of optimiser
steps taken, so micro-batches, recomputation, processes and a resumed run see the same b, and no
random generator is touched; all layers of equal rank draw the same b. last_only=True moves only the
b-th row of A and column of B in that step (the paper's frozen variant), whatever momentum or decay
the optimiser would give the others; without it the first b have gradients and the optimiser's
momentum may move the others on, as in the authors' code. `adapter.truncate(b)` takes the first b
ranks, as does loading and truncating; that adapter is the LoRA of A[:b], B[:, :b] and alpha. In
training the b ranks are chosen by factors of x Aᵀ (s_b, and 0 beyond b), not by slicing: a model is
compiled once, whatever b comes, and the products cost those of rank r. Source: arXiv:2210.07558,
algorithm 1. alpha=None means that every s_b is 1. Raises ConfigError for values that cannot be
meant. Differs from the paper: b is uniform (as in its experiments); no other distribution is
offered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import ConfigError
from ..ops import counter, low_rank
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
from .lora import LoRA


@dataclass(frozen=True, kw_only=True)
class DyLoRA:
    """See the module's equation."""

    r: int = 8
    r_min: int = 1
    alpha: float | None = None
    dropout: float = 0.0
    init: str = "gaussian"
    last_only: bool = False
    targets: Any = "all-linear"
    modules_to_save: tuple[str, ...] = ()
    train: tuple[str, ...] = ()
    selection: ClassVar[tuple[str, ...]] = ()
    seed: int = 0
    dtype: str = "float32"

    mergeable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_rank(self)
        low: Any = self.r_min
        if isinstance(low, bool) or not isinstance(low, int) or not 1 <= low <= self.r:
            raise ConfigError(
                f"{type(self).__name__}(r={self.r}, r_min={low!r}): r_min must be a whole number "
                "from 1 to r."
            )
        if self.alpha is not None:
            check_number(self, "alpha", low=0.0, open_low=True)
        check_choice(self, "init", ("gaussian", "kaiming"))
        if not isinstance(self.last_only, bool):
            raise ConfigError(
                f"{type(self).__name__}(last_only={self.last_only!r}): last_only must be True or "
                "False."
            )
        check_common(self)

    @property
    def scale(self) -> float:
        """s in the equation."""
        return 1.0 if self.alpha is None else self.alpha / self.r

    @property
    def audit_after(self) -> int:
        """Steps after which both A and B have moved: last_only moves A only where one b has come
        twice.
        """
        return self.r - self.r_min + 3 if self.last_only else 0

    def rank_at(self, step: int) -> int:
        """b of the training step after `step` finished ones."""
        word = int(counter.bits(counter.key_of(self.seed, "rank"), step, 1, 1))
        return self.r_min + word % (self.r - self.r_min + 1)

    def shortened(self, r: int) -> DyLoRA:
        return replace(self, r=min(r, self.r), r_min=min(r, self.r_min))

    def delta(self, p: Params, dtype: torch.dtype = torch.float32) -> Tensor:
        product: Tensor = p.B.to(dtype) @ p.A.to(dtype)
        return self.scale * product

    def update(self, x: Tensor, host: Host, p: Params, dtype: torch.dtype) -> Tensor:
        h = host.project(x, p.A, self.dropout, p.training, dtype)
        if p.training:
            return low_rank.up(h * self._scales(p.b, dtype), p.B.to(dtype))
        return low_rank.up(h, p.B.to(dtype), self.scale)

    def factors(self, host: Host, p: Params, x: Tensor | None = None) -> Factors:
        if p.training:
            wide = torch.promote_types(p.A.dtype, host.weight().dtype)
            return Factors(p.A, p.B, d=self._scales(p.b, wide), dropout=self.dropout)
        return Factors(p.A, p.B, s=self.scale)

    def _scales(self, b: Tensor, dtype: torch.dtype) -> Tensor:
        """[r]: s_b for the first b ranks, 0 beyond; b is a tensor, so that no compiled graph
        depends on its value.
        """
        scale = torch.ones_like(b, dtype=dtype) if self.alpha is None else self.alpha / b.to(dtype)
        return torch.where(torch.arange(self.r, device=b.device) < b, scale, 0.0)

    def effective_weight(self, W: Tensor, p: Params) -> Tensor:
        W = wide(W)
        return W + self.delta(p, W.dtype)

    def forward(self, x: Tensor, y: Tensor, host: Host, p: Params) -> Tensor:
        return y + self.update(x, host, p, y.dtype)

    def trained(self, out: int, in_: int) -> dict[str, Shape]:
        return {"A": (self.r, in_), "B": (out, self.r)}

    def start(self, host: Host, draw: Draw, shared: Shared | None) -> dict[str, Tensor]:
        return LoRA(r=self.r, init=self.init).start(host, draw, shared)

    def state(self, shape: tuple[int, int], device: torch.device) -> dict[str, Tensor]:
        """`step`, and the rank `b` of the step to come."""
        return {
            "step": torch.zeros((), dtype=torch.int64, device=device),
            "b": torch.full((), self.rank_at(0), dtype=torch.int64, device=device),
        }

    def reached(self, p: Params) -> str | None:
        return None

    def restore(self, p: Params, text: str) -> None:
        return None

    @property
    def follows_steps(self) -> bool:
        return self.r_min < self.r or self.last_only

    def still(self, p: Params) -> tuple[str, ...]:
        return ()

    def before_step(self, sites: Mapping[str, Any], scale: float, again: bool) -> None:
        for p in sites.values() if self.last_only else ():
            others = self._others(p)
            if not again:
                p.held = p.A.detach().clone(), p.B.detach().clone()
            for tensor, place in ((p.A, others), (p.B, (slice(None), others))):
                if tensor.grad is not None:
                    tensor.grad[place] = 0.0

    def after_step(self, sites: Mapping[str, Any]) -> None:
        step = 1 + max(int(p.step) for p in sites.values())
        for p in sites.values():
            if self.last_only:
                others, (A, B) = self._others(p), p.held
                p.A[others], p.B[:, others] = A[others], B[:, others]
                del p.held
            p.step.fill_(step)
            p.b.fill_(p.rule.rank_at(step))

    @staticmethod
    def _others(p: Any) -> Tensor:
        """[r], True but for the b-th rank."""
        others: Tensor = torch.arange(p.rule.r, device=p.A.device) != p.b - 1
        return others

    def share(self, shapes: Sequence[tuple[int, int]], device: torch.device) -> None:
        return None

    def share_key(self) -> None:
        return None
