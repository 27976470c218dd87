"""The rows of new tokens in an embedding or an output head, beside any method (`new_tokens`).

    E'[i] = rows[k] if i is the k-th of the ids, else E[i]        E [tokens, width], rows [n, width]

rows  [n, width]  trained; initially the rows that E has at attach. It holds the rows themselves and
                  not their change: a resized embedding has other random rows in every process.

An embedding looks E' up, and a head computes E' x + bias, whose bias stays. Only the n rows and their
products are computed: E' itself is built by merging alone. If several modules read E, they share
`rows`. It is no method of its own, and is not in METHODS.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops.norm import at_least_float32
from .base import Params, Shape, Shared
from .config import TensorConfig
from .rng import Rng


@dataclass(frozen=True, kw_only=True)
class TokenRows(TensorConfig):
    """See the module's text. `of_ids`: the module is an embedding, W [width, tokens]; else a head,
    W [tokens, width].
    """

    ids: tuple[int, ...] = ()
    of_ids: bool = True

    def shapes(self, out: int, in_: int) -> dict[str, Shape]:
        return {"rows": (len(self.ids), out if self.of_ids else in_)}

    def initial(self, layer: Any, rng: Rng, shared: Shared | None) -> dict[str, Tensor]:
        """Returns the present rows [n, width]."""
        W = layer.weight().detach()
        index = torch.tensor(self.ids, device=W.device)
        return {"rows": (W.t() if self.of_ids else W)[index].clone()}

    def forward(self, x: Tensor, y: Tensor, layer: Any, p: Params) -> Tensor:
        """Returns y [..., out] with the numbers of the new tokens in place of the frozen ones.

        x holds ids [...] or states [..., width]. Rows are rounded to the weight's dtype, as merged.
        """
        ids, rows = p.ids, p.rows.to(layer.weight().dtype)
        if self.of_ids:
            place = torch.searchsorted(ids, x.to(ids.dtype).contiguous())
            place = place.clamp_(max=len(ids) - 1)
            here = (ids[place] == x).unsqueeze(-1)
            return torch.where(here, layer.of_rows(place, rows).to(y.dtype), y)
        bias = layer.bias
        found = layer.of_rows(x, rows, None if bias is None else bias[ids]).to(y.dtype)
        if layer.fallback_reason is not None:
            return y.index_copy(-1, ids, found)
        # Logits are large, and nothing else has those that a plain linear layer returns.
        return y.index_copy_(-1, ids, found)

    def effective_weight(self, W: Tensor, p: Params) -> Tensor:
        """Returns W' [out, in] in float32 or wider."""
        wide, rows = at_least_float32(W).clone(), p.rows
        (wide.t() if self.of_ids else wide)[p.ids] = rows.to(wide.dtype)
        return wide
