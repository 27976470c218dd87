"""Initial values of one layer's tensors: a function of the seed and the names, and of nothing else."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import philox

# Parts of names that wrappers and nesting add.
_NESTING = {
    "module",
    "base_model",
    "model",
    "language_model",
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
}


class Rng:
    """Draws float32 tensors on `device` for the layer `name`; equal arguments give equal bits."""

    def __init__(self, seed: int, name: str, device: torch.device) -> None:
        self.seed, self.name, self.device = seed, name, device

    def without_nesting(self) -> Rng:
        """Returns the same for the layer's name in a model that is not wrapped or nested.

        Tensors that are drawn again on loading do not depend on the form in which the model is
        then.
        """
        name = ".".join(part for part in self.name.split(".") if part not in _NESTING)
        return Rng(self.seed, name, self.device)

    def normal(self, tensor: str, shape: tuple[int, ...], std: float) -> Tensor:
        """Returns a Gaussian matrix [rows, columns] of this shape, in float32."""
        key = philox.key_of(self.seed, self.name, tensor)
        return philox.normal(key, 0, shape[0], shape[1], std, self.device)

    def uniform(self, tensor: str, shape: tuple[int, ...], bound: float) -> Tensor:
        """Returns a matrix [rows, columns] of this shape, uniform in (-bound, bound), in float32."""
        key = philox.key_of(self.seed, self.name, tensor)
        return philox.uniform(key, 0, shape[0], shape[1], bound, self.device)

    def full(self, shape: tuple[int, ...], value: float = 0.0) -> Tensor:
        """Returns a float32 tensor [*shape] filled with `value`."""
        return torch.full(shape, value, dtype=torch.float32, device=self.device)
