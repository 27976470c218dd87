"""VeRA: two trained vectors per layer around two frozen random matrices shared by every layer.

    W' = W + diag(b) B diag(d) A               y = x W'ᵀ + bias

    A [r, in]   frozen, drawn once from `seed`, sliced from [r, max in]      d [r]    trained, starts at d_init
    B [out, r]  frozen, drawn once from `seed`, sliced from [max out, r]     b [out]  trained, starts at 0

b = 0 makes W' = W at step 0. Trained numbers per layer: out + r; there is no alpha, b and d carry
the scale. A and B are Kaiming-uniform (bound sqrt(6 / fan_in), as in the paper's runs). `d_init` is
0.1, the value of the paper's runs; its ablation (table 7) finds 1.0, the value that summaries of
the method quote, clearly worse (MRPC 70.3, RTE 60.3). Raises ConfigError for values that cannot be
meant. Source: arXiv:2310.11454, equation 2 and section 3. Differs from the paper: A and B come from
our own counter-based generator, whose bits no library version changes (`draw="peft"` redraws peft's
matrices instead, `draw="stored"` keeps matrices read from a file).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import ConfigError
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
from .projections import Projections


@dataclass(frozen=True, kw_only=True)
class VeRA:
    """See the module's equation."""

    r: int = 256
    d_init: float = 0.1
    dropout: float = 0.0
    targets: Any = "all-linear"
    modules_to_save: tuple[str, ...] = ()
    train: tuple[str, ...] = ()
    selection: ClassVar[tuple[str, ...]] = ()
    seed: int = 0
    dtype: str = "float32"
    draw: str = "weft"

    mergeable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_rank(self)
        check_number(self, "d_init", low=float("-inf"), open_low=True)
        if self.d_init == 0:
            raise ConfigError(
                f"{type(self).__name__}(d_init=0): with d and b both 0 no gradient reaches either, "
                "ever. "
                "The paper's runs start at 0.1."
            )
        check_choice(self, "draw", ("weft", "peft", "stored"))
        check_common(self)

    def delta(self, p: Params, dtype: torch.dtype = torch.float32) -> Tensor:
        A, B = self._frozen(p)
        product: Tensor = (p.b.to(dtype)[:, None] * B.to(dtype)) @ (
            p.d.to(dtype)[:, None] * A.to(dtype)
        )
        return product

    def update(self, x: Tensor, host: Host, p: Params, dtype: torch.dtype) -> Tensor:
        A, B = self._frozen(p)
        h = host.project(x, A.to(dtype), self.dropout, p.training)
        b: Tensor = p.b.to(dtype)
        return low_rank.up(h * p.d.to(dtype), B.to(dtype)) * b

    def factors(self, host: Host, p: Params, x: Tensor | None = None) -> Factors:
        A, B = self._frozen(p)
        return Factors(
            A, B, d=p.d, b=p.b, dropout=self.dropout if p.training else 0.0, share=p.shared.project
        )

    def effective_weight(self, W: Tensor, p: Params) -> Tensor:
        W = wide(W)
        return W + self.delta(p, W.dtype)

    def forward(self, x: Tensor, y: Tensor, host: Host, p: Params) -> Tensor:
        return y + self.update(x, host, p, y.dtype)

    def trained(self, out: int, in_: int) -> dict[str, Shape]:
        return {"d": (self.r,), "b": (out,)}

    def start(self, host: Host, draw: Draw, shared: Shared | None) -> dict[str, Tensor]:
        device = host.weight().device
        d = torch.full((self.r,), float(self.d_init), dtype=torch.float32, device=device)
        return {"d": d, "b": torch.zeros(host.out_features, dtype=torch.float32, device=device)}

    def share(self, shapes: Sequence[tuple[int, int]], device: torch.device) -> Shared:
        max_out, max_in = max(o for o, _ in shapes), max(i for _, i in shapes)
        return Projections(self.r, max_in, max_out, self.seed, self.draw, device)

    def share_key(self) -> tuple[Any, ...]:
        return ("projections", self.r, self.seed, self.draw)

    @staticmethod
    def _frozen(p: Params) -> tuple[Tensor, Tensor]:
        """This layer's A [r, in] and B [out, r]: views of the shared pair."""
        A, B = p.shared.A, p.shared.B
        return A[:, : p.shape[1]], B[: p.shape[0]]
