"""Earlier names of `checkpoint.py` and `problems.py`, which training/start.py still imports."""

from .checkpoint import Checkpoint as Stored
from .problems import SHOWN

__all__ = ["SHOWN", "Stored"]
