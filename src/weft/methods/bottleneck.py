"""Bottleneck adapters: a small network with a nonlinearity parallel to or after a frozen layer, and
six presets of one equation.

    y' = y + s (W_up phi(W_down h + b_down) + b_up)      y = the layer's own output
    h  = y (place="series") or the layer's input x (place="parallel"), through a LayerNorm of its own if layer_norm

    down [r, width of h], b_down [r], gain and shift [width of h]    trained; down Kaiming-uniform (bound 1/sqrt(width))
    up [out, r], b_up [out]                                          trained, start at 0, so y' = y at step 0

    preset    targets                        phi    bias  layer_norm  numbers (L blocks of width d)
    houlsby   attention-output, mlp-output   swish  yes               2 L (2dr + r + d)
    lin       mlp-output                     relu   yes   yes         L (2dr + r + d) + 2 L d
    pfeiffer  block-output                   relu   yes               L (2dr + r + d)
    drop      block-output                   relu   yes               (L - skip_layers)(2dr + r + d), skip_layers = 5
    series    mlp-output                     tanh   no                2 d r per layer
    parallel  mlp-output, h = x              tanh   no                r (in + out) per layer

A preset only gives defaults to fields that are not given; every field may be combined with it.
Targets are found by structure, before the residual sum. "block-output" is the layer norm after the
MLP in post-norm models (BERT): there y = LN(s) and y' = LN(s + a(y)), with the same frozen norm
applied again; in pre-norm models it is the MLP's output map. "attention-output" is that of every
attention, including a decoder's cross-attention. `skip_layers` counts from the input of every
stack, in encoder and decoder alike.

Not mergeable: the nonlinearity cannot be folded into a weight. Dropout applies to phi's output.
Dtype: float32 by default. Sources: Houlsby arXiv:1902.00751; Lin arXiv:2004.03829; Pfeiffer
arXiv:2005.00247; AdapterDrop arXiv:2010.11918; series and parallel as in LLM-Adapters
arXiv:2304.01933 (LLaMA's rows: targets=["up_proj", "down_proj"]). He et al. scale parallel by 4.
Differs from them: the originals start `up` at small random numbers (standard deviation 0.01 or
0.02), so the initial output is only close to the base's; Houlsby trains the model's LayerNorms too,
which the counts of arXiv:2106.09685 leave out; Lin's code reads the block's output after the
residual sum, here h is the MLP's output before that sum. Differs from the package `adapters`: its
dropout follows `up`, its Pfeiffer on a pre-norm model reads the sum of residual and MLP output
(original_ln_before), and its parallel adapter spans the whole MLP. Tests compare everything else
with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import TargetError
from .base import BaseLayer, Params, Shape, Shared
from .checks import check_choice, check_count, check_number
from .config import LayerConfig
from .rng import Rng

NONLINEARITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "swish": F.silu,
    "tanh": torch.tanh,
}

_PLAIN = {
    "targets": "mlp-output",
    "place": "series",
    "nonlinearity": "relu",
    "bias": True,
    "layer_norm": False,
    "scale": 1.0,
    "skip_layers": 0,
}
PRESETS: dict[str, dict[str, Any]] = {
    "houlsby": {**_PLAIN, "targets": ("attention-output", "mlp-output"), "nonlinearity": "swish"},
    "lin": {**_PLAIN, "layer_norm": True},
    "pfeiffer": {**_PLAIN, "targets": "block-output"},
    "drop": {**_PLAIN, "targets": "block-output", "skip_layers": 5},
    "series": {**_PLAIN, "nonlinearity": "tanh", "bias": False},
    "parallel": {**_PLAIN, "place": "parallel", "nonlinearity": "tanh", "bias": False},
}


@dataclass(frozen=True, kw_only=True)
class Bottleneck(LayerConfig):
    """See the module's equation. A field that is None takes the preset's value at construction."""

    preset: str = "houlsby"
    r: int = 64
    place: str | None = None
    nonlinearity: str | None = None
    bias: bool | None = None
    layer_norm: bool | None = None
    scale: float | None = None
    skip_layers: int | None = None
    dropout: float = 0.0
    targets: Any = None

    learning_rates: ClassVar[tuple[float, ...]] = (3e-3, 1e-2, 3e-2)
    mergeable: ClassVar[bool] = False
    not_mergeable: ClassVar[str] = (
        "a nonlinearity stands between its two maps, and no weight can hold it"
    )
    adapts_norms: ClassVar[bool] = True
    model_fields: ClassVar[tuple[str, ...]] = ("preset", "skip_layers")

    def __post_init__(self) -> None:
        check_choice(self, "preset", list(PRESETS))
        for field, value in PRESETS[self.preset].items():
            if getattr(self, field) is None:
                object.__setattr__(self, field, value)
        check_choice(self, "place", ("series", "parallel"))
        check_choice(self, "nonlinearity", list(NONLINEARITIES))
        super().__post_init__()
        check_count(self, "r", 1)
        check_number(self, "scale", low=0.0, open_low=True)
        check_count(self, "skip_layers", 0)
        check_number(self, "dropout", low=0.0, high=1.0, open_high=True)

    @property
    def blocks_left_out(self) -> int:
        return self.skip_layers or 0

    def rank(self, p: Params) -> int | None:
        return self.r

    def forward(self, x: Tensor, y: Tensor, layer: BaseLayer, p: Params) -> Tensor:
        """Returns y' [..., out] for the layer's input x [..., in] and its own output y [..., out].

        On a layer norm, which has no weight, the update is added to the input, and the norm is
        applied again.
        """
        update = self._update(x, y, layer, p)
        if not layer.has_weight:
            return layer.forward(x + update.to(x.dtype))
        return y + update.to(y.dtype)

    def _update(self, x: Tensor, y: Tensor, layer: BaseLayer, p: Params) -> Tensor:
        """Returns s (W_up phi(W_down h + b_down) + b_up) [..., out]; x has ids [...] if the layer
        is an embedding.
        """
        parallel, dtype = self.place == "parallel", y.dtype
        h = x if parallel else y
        if self.layer_norm:
            h = F.layer_norm(h.to(dtype), h.shape[-1:], p.gain.to(dtype), p.shift.to(dtype))
        down = p.down.to(dtype)
        z = (
            layer.down(h if layer.takes_ids else h.to(dtype), down)
            if parallel
            else F.linear(h, down)
        )
        z = NONLINEARITIES[str(self.nonlinearity)](z + p.b_down.to(dtype) if self.bias else z)
        if self.dropout and p.training:
            z = F.dropout(z, self.dropout)
        out = F.linear(z, p.up.to(dtype))
        out = out + p.b_up.to(dtype) if self.bias else out
        return out if self.scale == 1.0 else out * float(self.scale or 1.0)

    def shapes(self, out: int, in_: int) -> dict[str, Shape]:
        width = in_ if self.place == "parallel" else out
        names: dict[str, Shape] = {"gain": (width,), "shift": (width,)} if self.layer_norm else {}
        names["down"] = (self.r, width)
        if self.bias:
            names["b_down"] = (self.r,)
        names["up"] = (out, self.r)
        if self.bias:
            names["b_up"] = (out,)
        return names

    def initial(self, layer: BaseLayer, rng: Rng, shared: Shared | None) -> dict[str, Tensor]:
        """Returns down [r, width], up [out, r], and the biases and gain and shift [width] if
        configured.

        Raises TargetError if a parallel adapter with a LayerNorm is to read an embedding's ids.
        """
        ids = self.place == "parallel" and layer.takes_ids
        if ids and self.layer_norm:
            raise TargetError(
                'Bottleneck(place="parallel", layer_norm=True): an embedding reads ids, which no '
                "LayerNorm "
                "takes. Leave the embedding or the LayerNorm out."
            )
        tensors: dict[str, Tensor] = {}
        for name, shape in self.shapes(layer.out_features, layer.in_features).items():
            if name == "down":
                bound = 1.0 if ids else 1 / math.sqrt(shape[1])
                tensors[name] = rng.uniform(name, shape, bound)
            else:
                tensors[name] = rng.full(shape, 1.0 if name == "gain" else 0.0)
        return tensors
