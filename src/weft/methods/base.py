"""The interface of a method: a frozen dataclass that is both its configuration and its code.

    LowRankMethod    returns its factors (ops/low_rank.py); the forward, merging, export and mixed batches follow
    BranchMethod     computes something beside a layer that is no change of its weight (Bottleneck)
    PromptMethod     adds positions that tokens attend to (Prefix, PreEmbed, PreLayer)

Everything else that the library needs from a method has defaults in config.py. Tensors reach a
method as attributes of `p` (`p.A`, `p.B`), so that it can be read and tested without a model.
"""

from __future__ import annotations

from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
from ..ops.low_rank import LowRank

Shape = tuple[int, ...]


class Shared(nn.Module):
    """Tensors that every layer of an adapter reads, drawn from a seed."""

    def pool_key(self) -> tuple[Any, ...] | None:
        """Returns (share_key, max_out, max_in, device) if another adapter may read the same
        tensors.
        """
        return None


class Params(Protocol):
    """The tensors of one adapted layer, by attribute. `shape` is its (out, in); `training` switches
    dropout; `shared` holds the tensors of all layers, or None; `method` is the layer's
    configuration.
    """

    shape: tuple[int, int]
    training: bool
    shared: Any
    method: Any

    def __getattr__(self, name: str) -> Any: ...


class BaseLayer(Protocol):
    """The view of an adapted layer that a method gets; model/base_layers/ has one class per file.

    `takes_ids`: its input holds ids and its map is that of one-hot vectors. `has_weight`: it has a
    weight matrix, which layer norms lack.
    """

    takes_ids: bool
    has_weight: bool

    @property
    def out_features(self) -> int: ...
    @property
    def in_features(self) -> int: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def bias(self) -> Tensor | None:
        """The layer's bias [out], or None."""
        ...

    def weight(self) -> Tensor:
        """Returns W [out, in], a view without a copy."""
        ...

    def forward(self, x: Tensor) -> Tensor:
        """Returns the layer's own output [..., out] for another input x [..., in]."""
        ...

    def down(
        self, x: Tensor, A: Tensor, dropout: float = 0.0, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Returns dropout(x) Aᵀ [..., r] for A [r, in]; x holds ids [...] if the layer takes ids.

        A trained tensor is passed without a cast, with the `dtype` to compute in: a cast without
        gradients would hide that it is trained, and dropout would draw another mask.
        """
        ...


@runtime_checkable
class LowRankMethod(Protocol):
    """W' = σ ∘ (W + s diag(b) B diag(d) A)."""

    dropout: float  # on x, before A

    def factors(self, p: Params, training: bool = False) -> LowRank:
        """Returns the layer's tensors as they are, for evaluation or for the step at hand."""
        ...


@runtime_checkable
class BranchMethod(Protocol):
    """Computes beside a layer; it is a change of the weight only if the class is `mergeable`."""

    def forward(self, x: Tensor, y: Tensor, layer: BaseLayer, p: Params) -> Tensor:
        """Returns y' [..., out] from the layer's input x [..., in] and own output y [..., out]."""
        ...


@runtime_checkable
class PromptMethod(Protocol):
    """Trained vectors at virtual positions, which model/prompts finds by structure.

    `where`: "attention" (keys and values of every self-attention), "embeddings" (the model's input)
    or "block" (the input of every block). (out, in) are the widths of keys and values, or twice the
    width of the states.
    """

    where: ClassVar[str]


def effective_weight(method: Any, W: Tensor, p: Params) -> Tensor:
    """Returns W' [out, in] for W [out, in], in float32 or wider: the definition of a method.

    Raises UnsupportedError if the method is no change of weights.
    """
    if isinstance(method, LowRankMethod):
        return method.factors(p).weight(W)
    if not method.mergeable:
        name = type(method).__name__
        raise UnsupportedError(f"{name} has no effective weight: {method.not_mergeable}.")
    found: Tensor = method.effective_weight(W, p)
    return found
