"""DoRA: any update rule, with the length of every weight row trained apart from its direction.

    V  = W + delta                             delta = s B A for DoRA over LoRA
    W' = m · V / ‖V‖  row by row               y = x W'ᵀ + bias   (the bias stays outside the scale)

    m [out]   trained, starts at ‖W‖ row by row, so W' = W at step 0; the wrapped rule's tensors train beside it

Trained numbers per layer: those of the rule, plus out. There is one magnitude per *output row*: the
paper writes ‖·‖_c, "column-wise" over a d x k matrix with m in R^{1 x k}, but its code stores
weights as (out, in) and takes the norm along the inputs; read "column" as "the weight vector of one
output unit". The norm is a constant to the gradient (section 4.3), which changes no forward value;
norm_grad="exact" keeps the full gradient. With dropout, x is dropped on the update only and the
frozen part sees x whole; the authors' code drops it in the (m/‖V‖ - 1) W x term too. Without
dropout both are the merged form. The scale and norm are float32 or wider. Source: arXiv:2402.09353,
equation 5, section 4.3; s appears in the authors' code, not in the paper's equation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Parameter

from ..errors import ConfigError
from ..ops import magnitude
from ..ops.derived import Derived
from ..ops.factors import Factors, builds
from ..ops.fused import built
from .base import Draw, Host, Params, Shape, Shared, UpdateRule, check_choice, full_precision, wide
from .lora import LoRA


class Magnitude:
    """DoRA over `inner`, written once. A configuration derives from it, sets `inner` and nothing
    else.
    """

    inner: UpdateRule
    norm_grad: str
    mergeable: ClassVar[bool] = True

    def wrap(self, rule: type[Any]) -> None:
        """Build `inner` from the fields this configuration shares with `rule`, which checks and
        completes them.
        """
        check_choice(self, "norm_grad", ("constant", "exact"))
        shared = {f.name: getattr(self, f.name) for f in fields(rule)}
        try:
            inner = rule(**shared)
        except ConfigError as error:  # the user wrote DoRA(r=0), not LoRA(r=0)
            raise ConfigError(str(error).replace(rule.__name__, type(self).__name__, 1)) from None
        object.__setattr__(self, "inner", inner)
        for name in shared:
            object.__setattr__(self, name, getattr(inner, name))

    def norm(self, W: Tensor, p: Params) -> Tensor:
        """‖W + delta‖ of each row -> [out], in float32 or wider whatever the model's dtype and
        autocast.
        """
        if self.norm_grad == "exact":
            with full_precision(W.device):
                return magnitude.row_norm(self.inner.effective_weight(W, p))
        with torch.no_grad(), full_precision(W.device):
            return magnitude.row_norm(self.inner.effective_weight(W, p))

    def effective_weight(self, W: Tensor, p: Params) -> Tensor:
        V = self.inner.effective_weight(W, p)
        m: Tensor = p.m.to(V.dtype)
        return (m / magnitude.row_norm(V))[:, None] * V

    def forward(self, x: Tensor, y: Tensor, host: Host, p: Params) -> Tensor:
        norm = self.norm(host.weight(), p)
        scale = p.m.to(norm.dtype) / norm
        return magnitude.compose(y, host.bias, self.inner.update(x, host, p, y.dtype), scale)

    def factors(self, host: Host, p: Params, x: Tensor | None = None) -> Factors:
        f = self.inner.factors(host, p)
        if self.norm_grad == "exact":
            norm = self.norm(host.weight(), p)
            return replace(f, sigma=p.m.to(norm.dtype) / norm)
        return self._kept(host, p, f, x)

    def _kept(self, host: Host, p: Params, f: Factors, x: Tensor | None) -> Factors:
        """σ = m / ‖V‖, computed once for as long as W and the tensors of the update stand still;
        whether the output tells σ's gradient; and x Wᵀ or V, if it was made on the way.

        x Wᵀ and W Aᵀ in one product round as x is long. So training and evaluation have norms of
        their own: a run that is resumed, without the evaluation before, finds the same bits.
        """
        W, bias = host.weight(), host.bias
        made: dict[str, Any] = {}
        tensors = [t for t in (f.A, f.B, f.d, f.b) if t is not None]
        trained = [p.m, *(t for t in tensors if isinstance(t, Parameter))]
        frozen = [
            W,
            *([] if bias is None else [bias]),
            *(t for t in tensors if not isinstance(t, Parameter)),
        ]

        def compute() -> tuple[Tensor, Tensor, bool]:
            with full_precision(W.device):
                norm, found = _norm(W, f, p.derived, x, joint=p.training)
                made.update(found)
                m = p.m.to(norm.dtype)
                return m / norm, norm, magnitude.output_tells(m, norm, bias, W.dtype)

        sigma, norm, tells = p.derived.get(
            "norm" if p.training else "norm in use", trained, frozen, compute
        )
        return replace(
            f, sigma=sigma, m=p.m, norm=norm, output_tells=tells and not p.written, **made
        )

    def trained(self, out: int, in_: int) -> dict[str, Shape]:
        return {**self.inner.trained(out, in_), "m": (out,)}

    def start(self, host: Host, draw: Draw, shared: Shared | None) -> dict[str, Tensor]:
        tensors = self.inner.start(host, draw, shared)
        # delta is exactly 0 at the start of every rule, so this is the very number that `norm` will
        # find.
        return {**tensors, "m": magnitude.row_norm(host.weight().detach())}

    def share(self, shapes: Sequence[tuple[int, int]], device: torch.device) -> Shared | None:
        return self.inner.share(shapes, device)

    def share_key(self) -> tuple[Any, ...] | None:
        return self.inner.share_key()


def _norm(
    W: Tensor, f: Factors, kept: Derived, x: Tensor | None, joint: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """‖W + ΔW‖ of each row; and what the output of x needs too (fields of Factors), where it was
    made on the way.
    """
    A, frozen = f.A, not isinstance(f.A, Parameter)
    build = x is not None and builds(x, W, f, scaled=True)
    if W.numel() < magnitude.DENSE_BELOW or (frozen and 4 * A.shape[0] > W.shape[1]):
        exact = wide(W)
        V = built(exact, A.to(exact.dtype), f.folded(exact.dtype), None)
        return magnitude.row_norm(V), {"V": V} if build else {}
    norm, odd = kept.get(
        "norm of W", (), (W,), lambda: (n := magnitude.row_norm(W), magnitude.without_unit(n))
    )
    product, gram, made = None, None, {}
    if frozen:  # these stay, and cost a quarter of W's memory at most
        gram = kept.get("A A'", (), (A,), lambda: magnitude.product(A, A, norm.dtype))
        product = kept.get("W A'", (), (W, A), lambda: magnitude.product(W, A, norm.dtype))
    elif joint and not build and x is not None and magnitude.can_join(x, W, norm.dtype):
        made["base"], product = magnitude.joint_product(x, W, A)
    return magnitude.updated_norm(W, norm, A, f.folded(norm.dtype), product, gram, odd), made


@dataclass(frozen=True, kw_only=True)
class DoRA(Magnitude):
    """DoRA over LoRA. The fields are LoRA's, and `norm_grad`."""

    r: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    init: str = "kaiming"
    rslora: bool = False
    norm_grad: str = "constant"
    targets: Any = "all-linear"
    modules_to_save: tuple[str, ...] = ()
    train: tuple[str, ...] = ()
    selection: ClassVar[tuple[str, ...]] = ()
    seed: int = 0
    dtype: str = "float32"

    def __post_init__(self) -> None:
        self.wrap(LoRA)
