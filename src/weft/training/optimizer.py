"""The optimiser's parameter groups, for `weft train` and `weft compare`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..errors import ConfigError
from ..model.adapter import Adapter
from .config.sections import OptimSection


def groups(adapter: Adapter, optim: OptimSection) -> list[dict[str, Any]]:
    """Returns the parameter groups of `weft train`, each with one rate and one weight decay.

    Raises ConfigError if optim.head_lr is given and no head is trained.
    """
    selected = adapter.selected_tensors.values()
    if optim.head_lr is not None and not any(tensor.head for tensor in selected):
        raise ConfigError(
            "optim.head_lr is given, but no head is trained. Name it in method.modules_to_save, "
            "or leave optim.head_lr out."
        )
    rated: list[tuple[str, float, nn.Parameter]] = []
    for site in adapter.layers.values():
        for tensor, parameter in site.trainable().items():
            factor = optim.lr_factors.get(tensor, 1.0)
            name = tensor if factor != 1.0 else "adapter"
            rated.append((name, optim.lr * factor, parameter))
    rated += [("adapter", optim.lr, rows) for rows in adapter.token_rows.values()]
    for base in selected:
        rate = optim.head_lr if base.head and optim.head_lr is not None else optim.lr
        rated.append(("head" if base.head else "base", rate, base.trained))
    return grouped(rated, optim.weight_decay)


def grouped(
    rated: Iterable[tuple[str, float, nn.Parameter]], weight_decay: float
) -> list[dict[str, Any]]:
    """Groups parameters, each with a group name and a rate, by name, rate and weight decay.

    Weight decay acts on matrices. Vectors (biases, norms, magnitudes, VeRA's b and d) have none.
    """
    found: dict[tuple[str, float, float], list[nn.Parameter]] = {}
    for name, rate, parameter in rated:
        decay = weight_decay if parameter.ndim >= 2 else 0.0
        found.setdefault((name, rate, decay), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "weight_decay": decay, "name": name}
        for (name, rate, decay), parameters in found.items()
    ]
