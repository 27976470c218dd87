"""The prompt family: trained vectors at virtual positions, which every real token can attend to; no
weight changes.

    Prefix     attention over [P_K; K] and [P_V; V]     keys, values [n, kv heads * head width]   trained, each attention
    PreEmbed   input embeddings [before; prompt; after] before [l_p, d], after [l_i, d]           trained, once
    PreLayer   the same, and the state of these positions at the input of every block is trained: before, after, each block

Trained numbers: Prefix 2 n (kv width) a self-attention, so 2 n d L in a GPT-2; PreEmbed d (l_p +
l_i); PreLayer L d (l_p + l_i). A softmax over more positions is another softmax, so **no start
leaves the output as it was**: all tensors start Gaussian with standard deviation `std` (0.02, the
width at which GPT-2 and BERT start their embeddings).

Prefix, hidden=h: the paper's reparameterisation. In place of the keys and values an embedding E [n,
kv width] trains, and one MLP: [P_K, P_V] of a layer = up_layer tanh(down E + b_down) + b_layer,
with `down` shared by all layers. A file holds the keys and values that come out, and no MLP;
loaded, they train on directly.

Prefix, positions="shifted": real tokens count their positions from n on, as they do in the papers'
code and in peft, where the prefix lies in the key-value cache. "kept": they count from 0. Models
without position ids (T5, ViT) and encoders (BERT) have nothing to shift.

Where PreEmbed and PreLayer put them. In a decoder: `before` before the first column, `after` behind
the prompt, that is behind the last real token of each row; in training before the first label that
is not -100 (of a model that generates: the labels of a token classifier say nothing of the prompt).
They take up positions, and what the user sees has the shape it always has: the logits at the
prompt's last token, which predict the first token of the answer, are those of the last `after`. In
an encoder (BERT, ViT) they stand behind the embedding module and have no position embedding;
attention there knows no order, so before and after are the same, real tokens keep their positions,
and each answers for itself; a pooler reads real tokens only. Encoders whose tokens look back only
(CLIP's text) are refused. The state after the last block is not replaced: no real token reads it.
Where nothing stands behind the prompt (a classifier on the last token), the `after` of all blocks
but the last is read by nobody, gets no gradient, and the audit says so.

Not mergeable, and no export to LoRA: they are no change of weights. Rows of one batch may mix
prefixes, not virtual tokens. Dtype: float32 unless asked. Raises ConfigError for values that cannot
be meant; at attach TargetError where a model's attention does not go through transformers'
AttentionInterface, or its embeddings are not within reach. A prefix is seen by every token, in
layers with a sliding window too; virtual tokens are tokens, and fall out of it: left padding stands
between them and the prompt, so there, and nowhere else, it changes what a row sees. Sources: Prefix
arXiv:2101.00190, equation 3 and section 4.3; PreEmbed and PreLayer arXiv:2106.09685, section 5.1
(after arXiv:2104.08691). Differs from them: Li and Liang start from the activations of real words.
Cross-attention gets no prefix.
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
    """What all layers share of a reparameterised prefix: E [n, width], down [hidden, width] and
    b_down [hidden], trained.
    """

    def __init__(self, n: int, width: int, hidden: int, seed: int, device: torch.device) -> None:
        super().__init__()
        rng, bound = Rng(seed, "prefix", device), 1 / math.sqrt(width)
        self.E = nn.Parameter(rng.normal("E", (n, width), 1.0))
        self.down = nn.Parameter(rng.uniform("down", (hidden, width), bound))
        self.b_down = nn.Parameter(rng.full((hidden,)))

    def hidden(self) -> Tensor:
        """tanh(down E + b_down) [n, hidden], in float32 or wider."""
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
        super().__post_init__()
        check_count(self, "n", 1)
        if self.hidden is not None:
            check_count(self, "hidden", 1)
        check_choice(self, "positions", ("shifted", "kept"))
        check_number(self, "std", low=0.0)

    @property
    def shift(self) -> int:
        """By how much real tokens count their positions later."""
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
        """P_K [n, width of the keys] and P_V [n, width of the values]."""
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
        """What a file holds: the same prefix without the MLP that made it."""
        return replace(self, hidden=None)

    def finished_tensors(self, p: Params) -> dict[str, Tensor]:
        """Returns keys [n, out] and values [n, in], computed by the MLP if there is one."""
        keys, values = self.keys_values(p)
        return {"keys": keys, "values": values}


@dataclass(frozen=True, kw_only=True)
class VirtualTokens(TensorConfig):
    """What PreEmbed and PreLayer share: l_p trained vectors before the prompt and l_i behind it."""

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
    """The vectors are embeddings and enter with the input; see the module's text."""

    where: ClassVar[str] = "embeddings"
    learning_rates: ClassVar[tuple[float, ...]] = (3e-3, 1e-2, 3e-2)
    not_mergeable: ClassVar[str] = "it adds tokens to the input, and no weight can hold them"


@dataclass(frozen=True, kw_only=True)
class PreLayer(VirtualTokens):
    """The vectors are states, others at every block; see the module's text."""

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
