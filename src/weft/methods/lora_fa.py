"""LoRA-FA: LoRA with A frozen at its random start, so that only B trains and no input has to be
kept.

    W' = W + s B A              y = x W'ᵀ + bias,   s = alpha / r   (rslora: s = alpha / sqrt(r))

    A [r, in]   frozen, Kaiming-uniform with bound 1/sqrt(in) (1 on an embedding, whose input is one-hot), from `seed`
    B [out, r]  trained, starts at 0, so W' = W at step 0

Trained numbers per layer: r out. B's gradient needs only h = x Aᵀ, r numbers a token, and that is
all that is kept for backward, also with dropout (ops/frozen.py). A is in no file: its bits are a
function of the seed and of the layer's name, the same everywhere, and a checksum in the file is
held against them on loading. precondition=True multiplies B's gradient by (1/s)² (A Aᵀ)⁻¹ before
every optimiser step, which is then the step on B whose change of W' comes nearest to that of full
fine-tuning (the later version of the method, which peft's LoraFAOptimizer implements; it adds 1e-8
to the diagonal of A Aᵀ, and so does this). Source: arXiv:2308.03303, section 3. Differs from the
paper: A is uniform as in LoRA's code, not Gaussian, since no library reproduces Gaussian bits
everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..ops import low_rank
from ..ops.factors import Factors
from .base import Draw, Host, Params, Shape, Shared, check_common, check_number, check_rank, wide

# What wrappers and nestings put into a layer's name; A does not depend on it, so an adapter finds
# its A in either form.
_NESTING = {
    "module",
    "base_model",
    "model",
    "language_model",
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
}


@dataclass(frozen=True, kw_only=True)
class LoRAFA:
    """See the module's equation. alpha=None means alpha = r, that is s = 1 whatever r a layer
    has.
    """

    r: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    rslora: bool = False
    precondition: bool = False
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
        return {"B": (out, self.r)}

    def start(self, host: Host, draw: Draw, shared: Shared | None) -> dict[str, Tensor]:
        return {
            "B": torch.zeros(
                host.out_features, self.r, dtype=torch.float32, device=host.weight().device
            )
        }

    def fixed(
        self, kind: str, shape: tuple[int, int], draw: Draw, device: torch.device
    ) -> dict[str, Tensor]:
        place = ".".join(part for part in draw.site.split(".") if part not in _NESTING)
        bound = 1.0 if kind == "embedding" else 1 / math.sqrt(shape[1])
        return {"A": Draw(draw.seed, place).uniform("A", (self.r, shape[1]), bound, device)}

    @property
    def follows_steps(self) -> bool:
        return self.precondition

    def before_step(self, sites: Mapping[str, Any], scale: float, again: bool) -> None:
        for p in sites.values() if self.precondition else ():
            if p.B.grad is not None:
                A = wide(p.A)
                gram = A @ A.t() + 1e-8 * torch.eye(A.shape[0], dtype=A.dtype, device=A.device)
                step = wide(p.B.grad) @ torch.linalg.pinv(gram, hermitian=True) / p.rule.scale**2
                p.B.grad.copy_(step)

    def after_step(self, sites: Mapping[str, Any]) -> None:
        return None

    def share(self, shapes: Sequence[tuple[int, int]], device: torch.device) -> None:
        return None

    def share_key(self) -> None:
        return None
