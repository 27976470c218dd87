"""DVoRA: DoRA over VeRA's update; there is no third formula.

    V  = W + diag(b) B diag(d) A               (vera.py)
    W' = m · V / ‖V‖  per row                  (dora.py)

    A, B  frozen and shared      d [r], b [out], m [out]  trained;  b = 0 and m = ‖W‖ make W' = W at step 0

Trained numbers per layer: 2 out + r. The papers do not give d's start for DVoRA; we take VeRA's
0.1. Source: arXiv:2402.09353, section 5.4; its code was not released.
"""

from __future__ import annotations

from dataclasses import dataclass

from .dora import Magnitude
from .vera import VeRA


@dataclass(frozen=True, kw_only=True)
class DVoRA(Magnitude, VeRA):
    """DoRA over VeRA. The fields are VeRA's, and norm_grad."""

    norm_grad: str = "constant"
