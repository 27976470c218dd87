"""nn.Embedding: the linear map of one-hot vectors, with its table [num, dim] as W transposed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...ops import projection
from .base import BaseLayer, own_class, weight_fault
from .probe import other_map


class EmbeddingLayer(BaseLayer):
    """ids [...] -> rows of the table [..., out]; in is the number of ids."""

    kind = "embedding"
    takes_ids = True
    transposed = True

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return isinstance(module, nn.Embedding)

    @classmethod
    def why_not(cls, module: nn.Module) -> str | None:
        fault = weight_fault(module)
        if fault is not None:
            return fault
        if getattr(module, "max_norm", None) is not None:
            return "max_norm rewrites its weight in every forward"
        layer = cls(module)
        table = layer.weight().detach().t()
        plain = own_class(module).forward is nn.Embedding.forward
        if table.is_meta or (plain and "forward" not in module.__dict__):
            return None
        ids = torch.arange(min(3, table.shape[0]), device=table.device)
        return other_map(layer, ids, table[ids])

    def down(
        self, x: Tensor, A: Tensor, dropout: float = 0.0, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Returns [..., r]: the columns of A [r, in] that the ids x [...] select, after dropout."""
        padding: int | None = self.module.padding_idx  # type: ignore[assignment]
        return projection.down_index(x, A.to(dtype or A.dtype), dropout, padding)
