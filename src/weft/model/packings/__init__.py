"""The ways of storing a weight in few bits. A new one is a file in this folder and a line here."""

from __future__ import annotations

from torch import nn

from .base import SHADOW, Packing, parts
from .bitsandbytes import EightBit, FourBit
from .hqq import HQQ
from .subclasses import TensorSubclass
from .unread import Unread

PACKINGS: tuple[type[Packing], ...] = (FourBit, EightBit, TensorSubclass, HQQ, Unread)


def packing_of(module: nn.Module) -> type[Packing] | None:
    """Returns how a layer's weight is packed; None if it is not, or the module is no layer."""
    return next((packing for packing in PACKINGS if packing.matches(module)), None)


__all__ = ["PACKINGS", "SHADOW", "Packing", "packing_of", "parts"]
