"""Selections: methods that train tensors which the model already has.

    Full     every tensor                                 W' = trained copy of W
    Head     the output head only: d C + C numbers for a linear classifier
    BitFit   every bias vector, LayerNorm's shift included, starting from its pretrained value

No inference cost and nothing to compute differently: the trained copy takes the tensor's place, and the pretrained
value is kept beside it so that switching off and detaching are exact (one more copy of the selected tensors in memory).
Sources: BitFit arXiv:2106.10199; the baselines of arXiv:2106.09685, section 5.1 (the head is counted apart).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import check_modules
from .facts import TensorFact


@dataclass(frozen=True, kw_only=True)
class Full:
    """Full fine-tuning: all tensors train."""

    modules_to_save: tuple[str, ...] = ()
    mergeable: ClassVar[bool] = True
    nothing: ClassVar[str] = "it holds no parameter"

    def __post_init__(self) -> None:
        check_modules(self)

    def picks(self, fact: TensorFact) -> bool:
        return True


@dataclass(frozen=True, kw_only=True)
class Head:
    """The output head alone, on frozen features."""

    modules_to_save: tuple[str, ...] = ()
    mergeable: ClassVar[bool] = True
    nothing: ClassVar[str] = "no output head of its own was found (a head tied to the embedding is not one)"

    def __post_init__(self) -> None:
        check_modules(self)

    def picks(self, fact: TensorFact) -> bool:
        return fact.in_head


@dataclass(frozen=True, kw_only=True)
class BitFit:
    """All existing bias vectors. A new head is trained with `modules_to_save`, as with every other method."""

    modules_to_save: tuple[str, ...] = ()
    mergeable: ClassVar[bool] = True
    nothing: ClassVar[str] = "it has no bias vectors"

    def __post_init__(self) -> None:
        check_modules(self)

    def picks(self, fact: TensorFact) -> bool:
        return fact.is_bias and not fact.in_head
