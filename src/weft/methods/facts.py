"""What a method may know of a base tensor without knowing any model class."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TensorFact:
    """One parameter of the model. `is_bias`: a bias vector or a normalisation's shift; `in_head`: of the output head."""

    name: str
    shape: tuple[int, ...]
    is_bias: bool
    in_head: bool
