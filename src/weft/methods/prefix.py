"""The prompt family: trained vectors at virtual positions, to which every real token can attend; no
weight changes.

    Prefix     attention over [P_K; K] and [P_V; V]     keys, values [n, kv heads * head width]   trained, each attention
    PreEmbed   input embeddings [before; prompt; after] before [l_p, d], after [l_i, d]           trained, once
    PreLayer   the same, and the state of these positions at the input of every block is trained: before, after, each block

Trained numbers: Prefix 2 n (kv width) per self-attention, so 2 n d L in a GPT-2; PreEmbed d (l_p +
l_i); PreLayer L d (l_p + l_i). A softmax over more positions is another softmax, so **no initial
value leaves the output unchanged**: all tensors start Gaussian with standard deviation `std` (0.02,
that of the embeddings in GPT-2 and BERT).

Prefix, hidden=h: the paper's reparameterisation. Instead of the keys and values, an embedding E [n,
kv width] and one MLP are trained: [P_K, P_V] of a layer = up_layer tanh(down E + b_down) + b_layer,
with `down` shared by all layers. A file contains the resulting keys and values and no MLP; after
loading, they are trained directly.

Prefix, positions="shifted": positions of real tokens start at n, as in the papers' code and in
peft, which put the prefix into the key-value cache. "kept": they start at 0. Models without
position ids (T5, ViT) and encoders (BERT) have nothing to shift.

Positions of PreEmbed and PreLayer. In a decoder, `before` precedes the first column and `after`
follows the prompt: the last real token of each row or, in training, the token before the first
label that is not -100 (for models that generate; the labels of a token classifier do not show the
end of a prompt). The vectors take up positions, but outputs keep their usual shape: the logits at
the prompt's last token, which predict the first token of the answer, are those of the last `after`.
In an encoder (BERT, ViT) the vectors follow the embedding module and have no position embedding.
Attention there has no order, so before and after are equivalent; real tokens keep their positions
and their own outputs, and a pooler reads real tokens only. Encoders with causal attention (CLIP's
text encoder) are refused. The state after the last block is not replaced, since no real token reads
it. If no token follows the prompt (a classifier on the last token), the `after` vectors of all
blocks but the last are never read and get no gradient, and the audit reports them.

Not mergeable and not exportable to LoRA, since no weight changes. The rows of one batch may use
different prefixes, but not different virtual tokens. Dtype: float32 by default. Raises ConfigError
for invalid values, and TargetError at attach if the model's attention does not use transformers'
AttentionInterface or its embeddings are not accessible. Every token sees a prefix, even in layers
with a sliding window. Virtual tokens are tokens, and leave the window: left padding lies between
them and the prompt, so with a sliding window (and only there) padding changes the result of a row.
Sources: Prefix arXiv:2101.00190, equation 3 and section 4.3; PreEmbed and PreLayer
arXiv:2106.09685, section 5.1 (after arXiv:2104.08691). Differs from them: Li and Liang start from
the activations of real words. Cross-attention gets no prefix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError
from ..ops.norm import at_least_float32
from .base import BaseLayer, Params, Shape, Shared
from .checks import check_choice, check_count, check_number
from .config import DTYPES, TensorConfig
from .rng import Rng


class PrefixEncoder(Shared):
    """The trained tensors that all layers of a reparameterised prefix share: E [n, width], down
    [hidden, width] and b_down [hidden].
    """

    def __init__(self, n: int, width: int, hidden: int, seed: int, device: torch.device) -> None:
        super().__init__()
        rng, bound = Rng(seed, "prefix", device), 1 / math.sqrt(width)
        self.E = nn.Parameter(rng.normal("E", (n, width), 1.0))
        self.down = nn.Parameter(rng.uniform("down", (hidden, width), bound))
        self.b_down = nn.Parameter(rng.full((hidden,)))

    def hidden(self) -> Tensor:
        """Returns tanh(down E + b_down) [n, hidden], in float32 or float64."""
        return torch.tanh(
            F.linear(
                at_least_float32(self.E), at_least_float32(self.down), at_least_float32(self.b_down)
            )
        )


@dataclass(frozen=True, kw_only=True)
class Prefix(TensorConfig):
    """n trained keys and values in every self-attention; see the module's equation."""

    n: int = 20
    hidden: int | None = None
    positions: str = "shifted"
    std: float = 0.02

    mergeable: ClassVar[bool] = False
    not_mergeable: ClassVar[str] = (
        "its keys and values stand beside those of the tokens, and no weight can hold them"
    )
    starts_at_base: ClassVar[bool] = False
    where: ClassVar[str] = "attention"
    learning_rates: ClassVar[tuple[float, ...]] = (3e-2, 1e-1, 3e-1)

    def __post_init__(self) -> None:
        check_choice(self, "positions", ("shifted", "kept"))
        super().__post_init__()
        check_count(self, "n", 1)
        if self.hidden is not None:
            check_count(self, "hidden", 1)
        check_number(self, "std", low=0.0)

    @property
    def shift(self) -> int:
        """The number of positions by which real tokens are shifted."""
        return self.n if self.positions == "shifted" else 0

    def shapes(self, out: int, in_: int) -> dict[str, Shape]:
        if self.hidden is None:
            return {"keys": (self.n, out), "values": (self.n, in_)}
        return {"up": (out + in_, self.hidden), "b_up": (out + in_,)}

    def initial(self, layer: BaseLayer, rng: Rng, shared: Shared | None) -> dict[str, Tensor]:
        """Returns keys [n, out] and values [n, in]; with `hidden`, up [out + in, hidden] and its
        bias.
        """
        if self.hidden is None:
            return _gaussian(self, layer, rng)
        shape = (layer.out_features + layer.in_features, self.hidden)
        return {
            "up": rng.uniform("up", shape, 1 / math.sqrt(self.hidden)),
            "b_up": rng.full(shape[:1]),
        }

    def keys_values(self, p: Params) -> tuple[Tensor, Tensor]:
        """Returns P_K [n, width of the keys] and P_V [n, width of the values]."""
        if self.hidden is None:
            return p.keys, p.values
        both = F.linear(p.shared.hidden(), at_least_float32(p.up), at_least_float32(p.b_up))
        return both[:, : p.shape[0]], both[:, p.shape[0] :]

    def shared(self, shapes: Sequence[tuple[int, int]], device: torch.device) -> Shared | None:
        if self.hidden is None:
            return None
        return PrefixEncoder(
            self.n, max(out for out, _ in shapes), self.hidden, self.seed, device
        ).to(DTYPES[self.dtype])

    def share_key(self) -> tuple[Any, ...] | None:
        return None if self.hidden is None else ("prefix encoder", self.n, self.hidden, self.seed)

    def finished(self) -> Prefix:
        """Returns the configuration that a file contains: the same prefix without its MLP."""
        return replace(self, hidden=None)

    def finished_tensors(self, p: Params) -> dict[str, Tensor]:
        """Returns keys [n, out] and values [n, in], computed by the MLP if there is one."""
        keys, values = self.keys_values(p)
        return {"keys": keys, "values": values}


@dataclass(frozen=True, kw_only=True)
class VirtualTokens(TensorConfig):
    """The base of PreEmbed and PreLayer: l_p trained vectors before the prompt and l_i after it."""

    l_p: int = 20
    l_i: int = 0
    std: float = 0.02

    mergeable: ClassVar[bool] = False
    starts_at_base: ClassVar[bool] = False
    by_row: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_lengths(self)
        check_number(self, "std", low=0.0)

    def shapes(self, out: int, in_: int) -> dict[str, Shape]:
        return {
            name: (length, out)
            for name, length in (("before", self.l_p), ("after", self.l_i))
            if length
        }

    def initial(self, layer: BaseLayer, rng: Rng, shared: Shared | None) -> dict[str, Tensor]:
        """Returns Gaussian before [l_p, out] and after [l_i, out], without those of length 0."""
        return _gaussian(self, layer, rng)


@dataclass(frozen=True, kw_only=True)
class PreEmbed(VirtualTokens):
    """The vectors are embeddings that enter with the input; see the module's text."""

    where: ClassVar[str] = "embeddings"
    learning_rates: ClassVar[tuple[float, ...]] = (3e-3, 1e-2, 3e-2)
    not_mergeable: ClassVar[str] = "it adds tokens to the input, and no weight can hold them"


@dataclass(frozen=True, kw_only=True)
class PreLayer(VirtualTokens):
    """The vectors are states, new ones at every block; see the module's text."""

    where: ClassVar[str] = "block"
    not_mergeable: ClassVar[str] = "it adds positions to every block, and no weight can hold them"


def _gaussian(config: Any, layer: BaseLayer, rng: Rng) -> dict[str, Tensor]:
    shapes = config.shapes(layer.out_features, layer.in_features)
    return {name: rng.normal(name, shape, config.std) for name, shape in shapes.items()}


def _check_lengths(config: Any) -> None:
    check_count(config, "l_p", 0)
    check_count(config, "l_i", 0)
    if config.l_p + config.l_i == 0:
        raise ConfigError(
            f"{type(config).__name__}(l_p=0, l_i=0): there is nothing to train. Give at least one "
            "position."
        )
