"""Casts of an adapted layer whose update is a distance: of the trained A and B from their starts A0
and B0 (methods/starts.py).

`model.to(torch.bfloat16)` rounds A. To round A0 as well would round twice what is much larger than
the distance. So A0 stays as wide as it is, and moves by as much as A was moved: what the adapter
has learned is kept to the rounding of its own size, and one that has not learned changes nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def trained_of(layer: Any) -> dict[str, Tensor]:
    """Returns the trained tensors [...] that have a start, by the start's name."""
    return {
        name: layer.get_parameter(name.removesuffix("0")).detach() for name in layer.start_names
    }


def keep_distance(layer: Any, name: str, old: Tensor, start: Any) -> None:
    """Called after a layer was cast or moved, with the trained tensor [...] and its start [...]
    from before: sets the start in the layer.
    """
    new, cast = layer.get_parameter(name.removesuffix("0")).detach(), layer.get_buffer(name)
    if new.is_meta or old.is_meta or start.is_meta or cast is start:
        return
    wide = torch.promote_types(start.dtype, cast.dtype)
    kept = start.to(new.device, wide)
    if torch.promote_types(old.dtype, new.dtype) != new.dtype:
        kept = new.to(wide) - (old.to(new.device, wide) - kept)
    layer._buffers[name] = kept
