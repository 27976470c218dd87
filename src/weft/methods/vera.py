"""VeRA: two trained vectors per layer around two frozen random matrices shared by every layer.

    W' = W + diag(b) B diag(d) A               y = x W'ᵀ + bias

    A [r, in]   frozen, drawn once from `seed`, sliced from [r, max in]      d [r]    trained, starts at d_init
    B [out, r]  frozen, drawn once from `seed`, sliced from [max out, r]     b [out]  trained, starts at 0

b = 0 makes W' = W at step 0. Trained numbers per layer: out + r; no alpha, b and d carry the scale.
A and B are Kaiming-uniform (bound sqrt(6 / fan_in), as in the paper's runs). `d_init` is 0.1 as in
those; the ablation (table 7) finds 1.0, which summaries quote, clearly worse. Raises ConfigError if
a value is out of range. Source: arXiv:2310.11454, equation 2 and section 3. Differs from the paper:
A and B come from our own counter-based generator, whose bits no library version changes
(`draw="peft"` redraws peft's matrices instead, `draw="stored"` keeps matrices from a file).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import ConfigError
from ..ops.low_rank import LowRank
from .base import BaseLayer, Params, Shape, Shared
from .checks import check_choice, check_number
from .config import LowRankConfig
from .projections import Projections
from .rng import Rng


@dataclass(frozen=True, kw_only=True)
class VeRA(LowRankConfig):
    """See the module's equation."""

    r: int = 256
    d_init: float = 0.1
    draw: str = "weft"

    learning_rates: ClassVar[tuple[float, ...]] = (1e-2, 3e-2, 1e-1)

    def __post_init__(self) -> None:
        check_choice(self, "draw", ("weft", "peft", "stored"))
        super().__post_init__()
        check_number(self, "d_init", low=float("-inf"), open_low=True)
        if self.d_init == 0:
            why = "with d and b both 0 no gradient reaches either. The paper's runs start at 0.1."
            raise ConfigError(f"{type(self).__name__}(d_init=0): {why}")

    def factors(self, p: Params, training: bool = False) -> LowRank:
        out, in_ = p.shape
        return LowRank(p.shared.A[:, :in_], p.shared.B[:out], d=p.d, b=p.b)

    def shapes(self, out: int, in_: int) -> dict[str, Shape]:
        return {"d": (self.r,), "b": (out,)}

    def initial(self, layer: BaseLayer, rng: Rng, shared: Shared | None) -> dict[str, Tensor]:
        return {"d": rng.full((self.r,), self.d_init), "b": rng.full((layer.out_features,))}

    def shared(self, shapes: Sequence[tuple[int, int]], device: torch.device) -> Projections:
        outs, ins = zip(*shapes, strict=True)
        return Projections(self.r, max(ins), max(outs), self.seed, self.draw, device)

    def share_key(self) -> tuple[Any, ...]:
        return ("projections", self.r, self.seed, self.draw)
