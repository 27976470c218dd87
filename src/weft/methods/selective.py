"""Methods without tensors of their own: each trains tensors of the base model, by the words of
`train`.

    Full       "all"       every tensor                                 W' = trained copy of W
    TopLayers  "last:k"    the last k blocks and the norm behind them (FT^Top2: k = 2)
    Head       "head"      the output head only: d C + C numbers for a linear classifier
    BitFit     "biases"    every bias vector, LayerNorm's shift included, from its pretrained value

There is no inference cost, and no layer computes anything different: the trained copy replaces the
tensor, and the pretrained value is kept beside it so that switching off and detaching are exact
(one more copy of the selected tensors in memory). The papers count the head apart: Full trains it,
and `num_head_parameters` is its share; the others leave it alone, and a new head trains beside them
with `modules_to_save`. `train` adds tensors here too: BitFit(train=["norms"]). Sources: BitFit
arXiv:2106.10199; the baselines of arXiv:2106.09685, section 5.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .checks import check_count
from .config import Config


@dataclass(frozen=True, kw_only=True)
class Full(Config):
    """Full fine-tuning: all tensors train."""

    @property
    def selection(self) -> tuple[str, ...]:
        return ("all",)


@dataclass(frozen=True, kw_only=True)
class TopLayers(Config):
    """The last k blocks before the output, and the norm after them if the model has one (a
    post-norm model ends each block in its own). Embeddings, poolers and the head stay.

    The blocks are those of one stack: the decoder's of an encoder-decoder, and of several towers
    those of the one registered last; the plan lists them. A model without repeated blocks counts
    its own children that hold parameters, except the head. Attaching raises TargetError if k is
    more than the number of blocks. Source: the baseline FT^Top2 of arXiv:2106.09685, table 3; the
    prefix-tuning authors' code, option finetune-top.
    """

    k: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "k", 1)

    @property
    def selection(self) -> tuple[str, ...]:
        return (f"last:{self.k}",)


@dataclass(frozen=True, kw_only=True)
class Head(Config):
    """The output head alone, on frozen features."""

    learning_rates: ClassVar[tuple[float, ...]] = (1e-2, 3e-2, 1e-1)

    @property
    def selection(self) -> tuple[str, ...]:
        return ("head",)


@dataclass(frozen=True, kw_only=True)
class BitFit(Config):
    """All bias vectors outside the head. A new head is trained with `modules_to_save`, as with
    every other method.
    """

    learning_rates: ClassVar[tuple[float, ...]] = (3e-3, 1e-2, 3e-2)

    @property
    def selection(self) -> tuple[str, ...]:
        return ("biases",)
