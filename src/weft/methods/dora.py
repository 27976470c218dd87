"""DoRA: any low-rank method, with the length of every weight row trained separately from its
direction.

    V  = W + ΔW                                ΔW = s B A for DoRA over LoRA
    W' = m · V / ‖V‖  per row                  y = x W'ᵀ + bias   (the bias stays outside the scale)

    m [out]   trained, starts at ‖W‖ per row, so W' = W at step 0; the wrapped method's tensors train with it

Trained numbers per layer: those of the method, plus out. There is one magnitude per *output row*:
the paper writes ‖·‖_c, "column-wise", over a d x k matrix with m in R^{1 x k}, but its code stores
weights as (out, in) and takes the norm along the inputs; read "column" as "the weight vector of one
output unit". The norm is a constant for the gradient (section 4.3), which changes no forward value;
norm_grad="exact" keeps the full gradient. With dropout, x is dropped on the update only; the
authors' code drops it in the (m/‖V‖ - 1) W x term too. σ and the norm are float32 or wider. How σ =
m / ‖V‖ is computed once per optimiser step: ops/row_scale.py. Source: arXiv:2402.09353, equation 5,
section 4.3; s appears in the authors' code, not in the equation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from ..ops.low_rank import LowRank
from ..ops.norm import row_norm
from .base import BaseLayer, Params, Shape, Shared
from .checks import check_choice
from .config import LowRankConfig
from .lora import LoRA
from .rng import Rng

if TYPE_CHECKING:
    _Base = LowRankConfig
else:  # a dataclass would take default values from it, after those of VeRA
    _Base = object


class Magnitude(_Base):
    """m beside the tensors of the low-rank method that the configuration derives from as well."""

    norm_grad: str

    def __post_init__(self) -> None:
        check_choice(self, "norm_grad", ("constant", "exact"))
        super().__post_init__()

    def factors(self, p: Params, training: bool = False) -> LowRank:
        f = super().factors(p, training)
        return replace(f, m=p.m, norm_grad=self.norm_grad == "exact")

    def shapes(self, out: int, in_: int) -> dict[str, Shape]:
        return {**super().shapes(out, in_), "m": (out,)}

    def initial(self, layer: BaseLayer, rng: Rng, shared: Shared | None) -> dict[str, Tensor]:
        # ΔW is 0, so ‖W‖ is the very number that the first forward finds for ‖V‖.
        m = row_norm(layer.weight().detach())
        return {**super().initial(layer, rng, shared), "m": m}


@dataclass(frozen=True, kw_only=True)
class DoRA(Magnitude, LoRA):
    """DoRA over LoRA. The fields are LoRA's, and norm_grad."""

    init: str = "kaiming"
    norm_grad: str = "constant"
