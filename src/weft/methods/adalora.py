"""AdaLoRA: a trained singular value decomposition whose budget of triplets moves to the layers that
need it.

    W' = W + s P diag(lam) Q              y = x W'ᵀ + bias,   s = alpha / r

    P [out, r]   trained, Gaussian with standard deviation 0.02         lam [r, 1]   trained, starts at 0, so W' = W
    Q [r, in]    trained, Gaussian with standard deviation 0.02

After step t of `total_steps` T, while t < T - t_f (t_i = warm_up, t_f = final), every number w with
gradient g has

    I = |w g|,   mean I' = beta1 I' + (1 - beta1) I,   spread U' = beta2 U' + (1 - beta2) |I - I'|,   score = I' U'

and triplet i of a layer has the score of lam_i plus the mean scores of P[:, i] and of Q[i]. When t
is a multiple of `interval`, lam of all but the b(t) best triplets of all layers is set to 0. These
keep their vectors and can return.

    b(t) = b_0 for t <= t_i,   b_T + (b_0 - b_T) (1 - (t - t_i) / (T - t_i - t_f))³ rounded down,   b_T from T - t_f on

with b_0 and b_T the sums of r and target_r over the layers; from T - t_f on the selection is final.
The orthogonality loss gamma · mean(‖PᵀP - I‖_F, ‖QQᵀ - I‖_F over all layers) is added as its
gradient, just before the step. Trained numbers per layer: r (out + in + 1), until the end;
`adapter.ranks` has the current ranks. warm_up and final are steps or, below 1, fractions of T. T
may be set by the trainer (`adapter.plan_steps`). Source: arXiv:2303.10512, equations 2 to 12,
algorithm 1. Differs from the paper, as the authors' code and peft do: the norms of the loss are not
squared, and are averaged; I uses w after the step. s stays alpha / r for the initial r, so pruning
changes only the pruned triplet. Differs from peft (0.21.2): peft divides by r + 1e-5 (this r is a
parameter, which an optimiser of all trainable parameters moves and no file contains), prunes all
triplets that tie with the best pruned one (here exactly b(t) remain), and must be called by the
user after every step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import ConfigError
from ..ops.low_rank import LowRank
from ..ops.norm import at_least_float32
from .base import BaseLayer, Params, Shape, Shared
from .checks import check_alpha, check_count, check_number
from .config import LowRankConfig, scaling
from .rng import Rng
from .target_spec import Overrides

_TENSORS = ("P", "lam", "Q")
# One budget is shared by all layers, so these cannot differ between them.
_SCHEDULE = {"total_steps", "warm_up", "final", "interval", "beta1", "beta2"}


@dataclass(frozen=True, kw_only=True)
class AdaLoRA(LowRankConfig):
    """See the module's equation. target_r=None means two thirds of r; alpha=None means alpha = r,
    so s = 1.
    """

    r: int = 12
    target_r: int | None = None
    alpha: float | None = None
    total_steps: int | None = None
    warm_up: float = 0.1
    final: float = 0.3
    interval: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orthogonality: float = 0.5

    learning_rates: ClassVar[tuple[float, ...]] = (1e-2, 3e-2, 1e-1)
    moves_rank: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("target_r", "total_steps", "interval"):
            if getattr(self, name) is not None:
                check_count(self, name, 1)
        if self.target_r is not None and self.target_r > self.r:
            raise self._wrong(
                f"r={self.r}, target_r={self.target_r}",
                "the budget only falls: target_r is r or less.",
            )
        check_alpha(self)
        for name in ("beta1", "beta2"):
            check_number(self, name, low=0.0, high=1.0, open_low=True, open_high=True)
        check_number(self, "orthogonality", low=0.0)
        self._check_schedule()

    def _check_schedule(self) -> None:
        for name in ("warm_up", "final"):
            check_number(self, name, low=0.0)
            value = getattr(self, name)
            if value >= 1 and value != int(value):
                raise self._wrong(
                    f"{name}={value!r}", f"{name} is a number of steps, or a share of them below 1."
                )
        shares = [v for v in (self.warm_up, self.final) if v < 1]
        if self.total_steps is not None and sum(self.phases) >= self.total_steps:
            raise self._wrong(
                f"total_steps={self.total_steps}, warm_up={self.warm_up}, final={self.final}",
                "no step is left between them in which the budget could fall.",
            )
        if sum(shares) >= 1:
            raise self._wrong(
                f"warm_up={self.warm_up}, final={self.final}",
                "together they are all steps or more.",
            )
        if isinstance(self.targets, Overrides):
            for pattern, fields in self.targets.entries:
                for field, _ in fields:
                    if field in _SCHEDULE:
                        raise self._wrong(
                            f"targets={{{pattern!r}: ...}}",
                            f"{field} is one for all layers, which share a "
                            "budget; set it on the configuration itself.",
                        )

    def _wrong(self, what: str, why: str) -> ConfigError:
        return ConfigError(f"{type(self).__name__}({what}): {why}")

    @property
    def scale(self) -> float:
        """s in the equation."""
        return scaling(self.r, self.alpha)

    @property
    def follows_steps(self) -> bool:
        return True

    def with_steps(self, total: int) -> AdaLoRA:
        return replace(self, total_steps=total) if self.total_steps is None else self

    @property
    def final_r(self) -> int:
        """target_r, or its default."""
        return max(1, 2 * self.r // 3) if self.target_r is None else self.target_r

    @property
    def phases(self) -> tuple[int, int]:
        """The numbers of steps of the warm-up, in which the budget is b_0, and of the final phase,
        in which the selection is fixed.
        """
        warm_up, final = (
            int(v) if v >= 1 else round(v * (self.total_steps or 0))
            for v in (self.warm_up, self.final)
        )
        return warm_up, final

    def budget(self, step: int, first: int, last: int) -> int:
        """Returns b(t) for `first` triplets at the start and `last` at the end.

        Raises ConfigError if total_steps is None.
        """
        if self.total_steps is None:
            raise self._wrong(
                "total_steps=None",
                "the budget falls over a number of steps that nobody has said. "
                "Write weft.AdaLoRA(total_steps=N), or call adapter.plan_steps(N) before the first "
                "optimiser "
                "step, as Weft's trainer does.",
            )
        start, end = self._span()
        if step <= start:
            return first
        if step >= end:
            return last
        return int((first - last) * (1 - (step - start) / (end - start)) ** 3 + last)

    def _span(self) -> tuple[int, int]:
        """Returns t_i and T - t_f."""
        warm_up, final = self.phases
        return warm_up, (self.total_steps or 0) - final

    def factors(self, p: Params, training: bool = False) -> LowRank:
        return LowRank(p.Q, p.P, d=p.lam[:, 0], s=self.scale)

    def shapes(self, out: int, in_: int) -> dict[str, Shape]:
        return {"P": (out, self.r), "lam": (self.r, 1), "Q": (self.r, in_)}

    def initial(self, layer: BaseLayer, rng: Rng, shared: Shared | None) -> dict[str, Tensor]:
        """Returns Gaussian P [out, r] and Q [r, in], and lam [r, 1] of zeros."""
        return {
            "P": rng.normal("P", (layer.out_features, self.r), 0.02),
            "lam": rng.full((self.r, 1)),
            "Q": rng.normal("Q", (self.r, layer.in_features), 0.02),
        }

    def buffers(self, out: int, in_: int, device: torch.device) -> dict[str, Tensor]:
        """Returns `step` [], `kept` [r] (the last selection), and the mean and spread of the
        sensitivity of every trained tensor, in its shape.
        """
        trained = self.shapes(out, in_).items()
        return {
            "step": torch.zeros((), dtype=torch.int64, device=device),
            "kept": torch.ones(self.r, dtype=torch.bool, device=device),
            **{
                f"{name}_{what}": torch.zeros(size, dtype=torch.float32, device=device)
                for name, size in trained
                for what in ("mean", "spread")
            },
        }

    def rank(self, p: Params) -> int:
        """Returns the number of triplets in the last selection, or r on the meta device."""
        return self.r if p.kept.is_meta else int(p.kept.sum())

    def extra_state(self, p: Params) -> str:
        """Returns the selection as text: "1" for a kept triplet, "0" for a pruned one."""
        return "1" * self.r if p.kept.is_meta else "".join("01"[kept] for kept in p.kept.tolist())

    def is_extra_state(self, text: str) -> bool:
        return len(text) == self.r and set(text) <= {"0", "1"}

    def load_extra_state(self, p: Params, text: str) -> None:
        p.kept.copy_(torch.tensor([mark == "1" for mark in text]))

    def unmoved(self, p: Params) -> tuple[str, ...]:
        """Returns all tensors of a layer without triplets: lam is 0 again, as at the start, so P
        and Q have no gradient.
        """
        return () if p.kept.any() else _TENSORS

    def before_step(self, layers: Mapping[str, Any], grad_scale: float, repeated: bool) -> None:
        self.budget(
            0, 0, 0
        )  # now, and not after a step has been taken that no schedule has counted
        for p in layers.values():
            gamma = grad_scale * p.method.orthogonality / (2 * len(layers))
            for tensor, wide_side in ((p.P, False), (p.Q, True)):
                if tensor.requires_grad and gamma:
                    gradient = (gamma * _skewness_gradient(at_least_float32(tensor), wide_side)).to(
                        tensor.dtype
                    )
                    tensor.grad = gradient if tensor.grad is None else tensor.grad.add_(gradient)

    def after_step(self, layers: Mapping[str, Any]) -> None:
        step = 1 + max(int(p.step) for p in layers.values())
        first, last = (sum(getattr(p.method, r) for p in layers.values()) for r in ("r", "final_r"))
        budget, (start, end) = self.budget(step, first, last), self._span()
        if step < end:
            self._measure(layers)
        if step == end or (start < step < end and step % self.interval == 0):
            _choose(layers, budget)
        for p in layers.values():
            if step >= end or (start < step and step % self.interval == 0):
                p.lam.masked_fill_(~p.kept[:, None], 0.0)
            p.step.fill_(step)

    def _measure(self, layers: Mapping[str, Any]) -> None:
        """Updates the smoothed mean and spread of the sensitivity |w g|."""
        for p in layers.values():
            for name in _TENSORS:
                w, mean, spread = (
                    getattr(p, key) for key in (name, f"{name}_mean", f"{name}_spread")
                )
                now = torch.zeros_like(w) if w.grad is None else (w.detach() * w.grad).abs()
                mean.copy_(self.beta1 * mean + (1 - self.beta1) * now)
                spread.copy_(self.beta2 * spread + (1 - self.beta2) * (now - mean).abs())


def _choose(layers: Mapping[str, Any], budget: int) -> None:
    """Marks the `budget` best triplets of all layers as kept; of equal ones, those of earlier
    layers.
    """
    scores = [_scores(p).cpu() for p in layers.values()]
    best = torch.sort(torch.cat(scores), descending=True, stable=True).indices[:budget]
    kept = torch.zeros(sum(map(len, scores)), dtype=torch.bool)
    kept[best] = True
    for p, part in zip(layers.values(), torch.split(kept, [len(s) for s in scores]), strict=True):
        p.kept.copy_(part)


def _scores(p: Any) -> Tensor:
    """Returns the importance [r] of every triplet of a layer."""
    P, lam, Q = (getattr(p, f"{name}_mean") * getattr(p, f"{name}_spread") for name in _TENSORS)
    total: Tensor = lam[:, 0] + (Q.mean(dim=1) + P.mean(dim=0))
    return total


def _skewness_gradient(M: Tensor, wide_side: bool) -> Tensor:
    """Returns the gradient of ‖M Mᵀ - I‖_F (of ‖MᵀM - I‖_F for a tall M), or 0 if that norm is 0."""
    gram = M @ M.t() if wide_side else M.t() @ M
    off = gram - torch.eye(len(gram), dtype=M.dtype, device=M.device)
    unit: Tensor = 2 * off / torch.linalg.matrix_norm(off).clamp_min(torch.finfo(M.dtype).tiny)
    return unit @ M if wide_side else M @ unit
