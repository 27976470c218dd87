"""What a method may know of a base tensor without knowing any model class."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TensorFact:
    """One parameter of the model. `is_bias`: a bias vector or a normalisation's shift; `in_head`:
    of the output head.

    `block`: the place, from 0, of the tensor's block in the stack before the output, which has
    `blocks` blocks; None outside that stack. `final_norm`: of the normalisation behind that stack.
    """

    name: str
    shape: tuple[int, ...]
    is_bias: bool
    in_head: bool
    block: int | None = None
    blocks: int = 0
    final_norm: bool = False
