"""The routed experts of mixtures, and their routers."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn

from .names import ATTENTION, within

_EXPERTS = re.compile(r"experts?(_|$)|experts", re.IGNORECASE)
_SHARED_EXPERT = re.compile(r"shared_?expert", re.IGNORECASE)


def find_experts(modules: Mapping[str, nn.Module]) -> dict[str, int]:
    """Returns the containers of routed experts, with the number of experts in each."""
    found: dict[str, int] = {}
    for name, module in modules.items():
        label = name.rpartition(".")[2]
        if not name or within(name, found) or _SHARED_EXPERT.search(label):
            continue
        if _EXPERTS.search(label) or "Experts" in type(module).__name__:
            count = _count(module)
            if count > 1:
                found[name] = count
    return found


def find_routers(root: nn.Module, experts: Mapping[str, int]) -> list[str]:
    """Returns the routers: modules beside the experts whose weight has one row per expert, or a
    single row (the gate of a shared expert).
    """
    routers = []
    for container, count in experts.items():
        parent = container.rpartition(".")[0]
        for name, module in root.get_submodule(parent).named_modules(prefix=parent):
            weight = module._parameters.get("weight")
            if (
                within(name, experts)
                or weight is None
                or weight.ndim != 2
                or weight.shape[0] not in (1, count)
            ):
                continue
            beside = name.removeprefix(parent).rpartition(".")[0]
            # A key projection beside the experts may have as many rows as there are experts.
            if not _SHARED_EXPERT.search(beside) and not ATTENTION.search(beside):
                routers.append(name)
    return list(dict.fromkeys(routers))


def _count(module: nn.Module) -> int:
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        return len(module)
    stacked = [p.shape[0] for p in module._parameters.values() if p is not None and p.ndim == 3]
    return max(stacked, default=0)
