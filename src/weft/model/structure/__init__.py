"""The parts of a model, and the layers and tensors that a configuration selects from them."""

from .modules import base_modules, base_parameters
from .names import WRAPPERS, canonical, ends_in, within
from .structure import Structure

__all__ = [
    "WRAPPERS",
    "Structure",
    "base_modules",
    "base_parameters",
    "canonical",
    "ends_in",
    "within",
]
