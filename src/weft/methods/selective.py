"""Selections: methods that train tensors which the model already has.

    Full       every tensor                                 W' = trained copy of W
    TopLayers  the last k blocks and the normalisation behind them (FT^Top2: k = 2)
    Head       the output head only: d C + C numbers for a linear classifier
    BitFit     every bias vector, LayerNorm's shift included, starting from its pretrained value

No inference cost and nothing to compute differently: the trained copy takes the tensor's place, and
the pretrained value is kept beside it so that switching off and detaching are exact (one more copy
of the selected tensors in memory). The papers count the head apart: Full trains it and
`num_head_parameters` says its share; the others leave it alone, and a new head trains beside them
with `modules_to_save`. Sources: BitFit arXiv:2106.10199; the baselines of arXiv:2106.09685, section
5.1 (the head is counted apart).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..errors import TargetError
from .checks import check_count
from .config import Config
from .facts import TensorFact


@dataclass(frozen=True, kw_only=True)
class Full(Config):
    """Full fine-tuning: all tensors train."""

    nothing: ClassVar[str] = "it holds no parameter"

    def picks(self, fact: TensorFact) -> bool:
        return True


@dataclass(frozen=True, kw_only=True)
class TopLayers(Config):
    """The last k blocks before the output, with the normalisation behind them where the model has
    one (a post-norm model ends each block in its own). Embeddings, poolers and the head stay.

    The blocks are those of one stack: of encoder and decoder the decoder's, of several towers the
    one registered last; the plan lists them. A model without repeated blocks counts its own
    children that hold parameters, the head apart. Raises TargetError at attach where k is more than
    the blocks there are. Source: the baseline FT^Top2 of arXiv:2106.09685, table 3; the
    prefix-tuning authors' code, option finetune-top.
    """

    k: int = 2
    nothing: ClassVar[str] = (
        "it has neither repeated blocks nor children with parameters beside its head"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "k", 1)

    def picks(self, fact: TensorFact) -> bool:
        if fact.blocks and self.k > fact.blocks:
            raise TargetError(
                f"TopLayers(k={self.k}): the model has {fact.blocks} blocks. Take fewer, or "
                "weft.Full()."
            )
        return fact.final_norm or (fact.block is not None and fact.block >= fact.blocks - self.k)


@dataclass(frozen=True, kw_only=True)
class Head(Config):
    """The output head alone, on frozen features."""

    nothing: ClassVar[str] = (
        "no output head of its own was found (a head tied to the embedding is not one)"
    )

    def picks(self, fact: TensorFact) -> bool:
        return fact.in_head


@dataclass(frozen=True, kw_only=True)
class BitFit(Config):
    """All existing bias vectors. A new head is trained with `modules_to_save`, as with every other
    method.
    """

    learning_rates: ClassVar[tuple[float, ...]] = (3e-3, 1e-2, 3e-2)
    nothing: ClassVar[str] = "it has no bias vectors"

    def picks(self, fact: TensorFact) -> bool:
        return fact.is_bias and not fact.in_head
