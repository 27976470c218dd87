"""The optimiser's parameter groups for `weft train`."""

from __future__ import annotations

from typing import Any

from ..errors import ConfigError
from ..model.adapter import Adapter
from ..model.groups import parameter_groups
from .config.sections import OptimSection


def groups(adapter: Adapter, optim: OptimSection) -> list[dict[str, Any]]:
    """Returns the parameter groups of `weft train`, each with one rate and one weight decay.

    Raises ConfigError if a rate has no tensor to act on, such as optim.head_lr without a head.
    """
    try:
        return parameter_groups(
            adapter,
            optim.lr,
            lora_plus=optim.lora_plus,
            head_lr=optim.head_lr,
            lr_factors=optim.lr_factors,
            weight_decay=optim.weight_decay,
        )
    except ConfigError as error:
        raise ConfigError(f"optim: {error}") from None
