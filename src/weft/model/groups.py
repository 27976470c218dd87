"""An adapter's parameters in groups for an optimiser, each with one rate and one weight decay."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from ..errors import ConfigError
from .adapter import Adapter

LORA_PLUS = ("A", "B")  # a method needs both to be trained with LoRA+


def parameter_groups(
    adapter: Adapter,
    lr: float,
    *,
    lora_plus: float | None = None,
    head_lr: float | None = None,
    lr_factors: Mapping[str, float] | None = None,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Returns the groups for a torch optimiser: `AdamW(weft.parameter_groups(adapter, 2e-4, ...))`.

    Every trained tensor of the adapter is in one group. `lr` is their rate. lora_plus: the rate of
    B is that many times the rate of A (LoRA+, arXiv:2402.12354); an embedding, where A and B change
    places, keeps `lr`. head_lr: the rate of the head and of `modules_to_save`. lr_factors:
    multiples of `lr` by the name of a tensor. weight_decay acts on matrices; vectors (biases,
    norms, magnitudes, VeRA's b and d) have none. Each group has a "name".

    Raises ConfigError if a number is not above 0 (weight_decay: below 0), or if one of the options
    has no tensor to act on.
    """
    _check_numbers(lr, lora_plus, head_lr, weight_decay)
    factors = dict(lr_factors or {})
    check_factors(adapter.config, _trained_names(adapter), factors, lora_plus)
    selected = adapter.selected_tensors.values()
    if head_lr is not None and not any(tensor.head for tensor in selected):
        raise ConfigError(
            "head_lr is given, but no head is trained. Name it in modules_to_save, or leave head_lr "
            "out."
        )
    rated: list[tuple[str, float, nn.Parameter]] = []
    for layer in adapter.layers.values():
        for tensor, parameter in layer.trainable().items():
            factor = factors.get(tensor, 1.0)
            if lora_plus is not None and tensor == "B" and not layer.base.takes_ids:
                factor = lora_plus
            rated.append((tensor if factor != 1.0 else "adapter", lr * factor, parameter))
    rated += [("adapter", lr, parameter) for parameter in adapter.shared_parameters.values()]
    rated += [("adapter", lr, rows) for rows in adapter.token_rows.values()]
    for base in selected:
        rate = head_lr if base.head and head_lr is not None else lr
        rated.append(("head" if base.head else "base", rate, base.trained))
    return _grouped(rated, weight_decay)


def check_factors(
    config: Any,
    trained: Collection[str],
    factors: Mapping[str, float],
    lora_plus: float | None,
    prefix: str = "",
) -> None:
    """Raises ConfigError if the method does not train the tensors that have rates of their own.

    `trained`: the names of its tensors. `prefix`: what stands before the options in messages.
    """
    method = type(config).__name__
    have = (
        f"It trains {', '.join(trained)}." if trained else "It has no tensors of its own; use lr."
    )
    for name, value in factors.items():
        if isinstance(value, bool) or not math.isfinite(value) or value <= 0:
            raise ConfigError(f"{prefix}lr_factors.{name}={value!r}: write a number above 0.")
        if name not in trained:
            raise ConfigError(
                f"{prefix}lr_factors.{name}: {method} trains no tensor of that name. {have}"
            )
    if lora_plus is None:
        return
    if not set(LORA_PLUS) <= set(trained):
        raise ConfigError(
            f"{prefix}lora_plus is a ratio of the rates of B and A, and {method} does not train "
            f"both. {have} Leave lora_plus out."
        )
    if "B" in factors:
        raise ConfigError(
            f"{prefix}lora_plus and {prefix}lr_factors.B are both rates of B; give one of them."
        )


def _trained_names(adapter: Adapter) -> list[str]:
    return list(dict.fromkeys(n for layer in adapter.layers.values() for n in layer.names))


def _check_numbers(
    lr: float, lora_plus: float | None, head_lr: float | None, weight_decay: float
) -> None:
    for name, value in (("lr", lr), ("lora_plus", lora_plus), ("head_lr", head_lr)):
        if value is not None and not (_is_number(value) and value > 0):
            raise ConfigError(f"parameter_groups({name}={value!r}): write a number above 0.")
    if not (_is_number(weight_decay) and weight_decay >= 0):
        raise ConfigError(
            f"parameter_groups(weight_decay={weight_decay!r}): write 0 or a number above it."
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _grouped(
    rated: list[tuple[str, float, nn.Parameter]], weight_decay: float
) -> list[dict[str, Any]]:
    """Groups parameters, each with a group's name and a rate, by name, rate and weight decay."""
    found: dict[tuple[str, float, float], list[nn.Parameter]] = {}
    for name, rate, parameter in rated:
        decay = weight_decay if parameter.ndim >= 2 else 0.0
        found.setdefault((name, rate, decay), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "weight_decay": decay, "name": name}
        for (name, rate, decay), parameters in found.items()
    ]
