"""`weft.combine`: several adapters with strengths as one new adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from .. import methods
from ..errors import UnsupportedError, WeftError
from ..methods.config import DTYPES
from ..methods.sums import Terms, distance, method_of, summed
from ..ops.grouped_norm import of_weight
from ..ops.low_rank import LowRank
from .adapter import Adapter
from .attach import Parts, attach_resolved
from .attach_checks import check_name
from .offload import loaded
from .state import State, base_only, state_of
from .structure import Structure, targets
from .use import checked_strengths

# Largest error of a row of W', relative, that the rounding of the new tensors may cause.
LIMIT = {torch.float32: 1e-5, torch.float64: 1e-12}


def combine(model: nn.Module, strengths: Mapping[str, float], name: str) -> Adapter:
    """Attaches a new adapter `name` with the weight W + Σ w (W' - W) in every layer, where W' is
    that of an adapter and w its strength, makes it active, and returns its handle.

    It is what `weft.use(model, strengths)` computes, as one adapter whose rank is the sum of the
    ranks (at most the smaller side of the layer), with magnitudes if one of the adapters has them:
    exact, up to rounding in float32 or float64, which is measured. The adapters stay attached and
    are not read again. Dropout is theirs if they agree, else 0.

    Raises WeftError (no strengths, no such adapter, the name is taken), ConfigError (a strength is
    not a finite number), UnsupportedError (an adapter is not of low rank or trains base tensors or
    rows of new tokens; or the sum is no such adapter, with the measured error), MergeError (an
    adapter is merged).
    """
    state = state_of(model)
    with base_only(state):
        check_name(state, name)
        given = checked_strengths(state, strengths, "weft.combine")
        structure = Structure.of(state.root)
        terms = _terms(state, given)
        config, factors = _added(state, given, terms)
        configs = {
            module: methods.replace(config, {"r": factors[module].A.shape[-2]})
            for module in structure.carriers
            if module in factors
        }
        frozen, routed = targets.leftovers(structure, configs)

        def fill(adapter: Adapter) -> None:
            _fill(adapter, factors, terms)

        parts = Parts(configs, frozen=frozen, routed=routed)
        return attach_resolved(structure, config, parts, name, fill=fill)


def _terms(state: State, strengths: Mapping[str, float]) -> dict[str, Terms]:
    """Strengths and factors by layer."""
    terms: dict[str, list[tuple[float, LowRank]]] = {}
    for name, strength in strengths.items():
        for tensor, p in state.adapter(name).named_parameters():
            if p.is_meta or not bool(torch.isfinite(p).all()):
                raise WeftError(f"{tensor!r} of adapter {name!r} holds NaN, infinity or no values.")
        for module, layer in state.adapter(name).layers.items():
            terms.setdefault(module, []).append((strength, layer.method.factors(layer)))
    return terms  # type: ignore[return-value]


@torch.no_grad()
def _added(
    state: State, strengths: Mapping[str, float], terms: Mapping[str, Terms]
) -> tuple[Any, dict[str, LowRank]]:
    """The new adapter's configuration, and its factors by layer."""
    configs = [state.adapter(name).config for name in strengths]
    magnitude = any(f.m is not None for of_layer in terms.values() for _, f in of_layer)
    factors: dict[str, LowRank] = {}
    for module, of_layer in terms.items():
        among = (state.adapter(name).layers for name in strengths)
        base = next(layers[module].base for layers in among if module in layers)
        with loaded(base.host):
            W = base.weight()
            factors[module] = _summed(W, of_layer, magnitude)
    dtypes = [t.dtype for of_layer in terms.values() for _, f in of_layer for t in f.tensors()]
    dtype = reduce(torch.promote_types, dtypes, torch.float32)
    dropout = {config.dropout for config in configs}
    config = method_of(magnitude)(
        r=max(f.A.shape[-2] for f in factors.values()),
        dropout=dropout.pop() if len(dropout) == 1 else 0.0,
        dtype=next(name for name, known in DTYPES.items() if known == dtype),
        targets=list(factors),
        freeze_batch_norm=any(config.freeze_batch_norm for config in configs),
    )
    return config, factors


def _summed(W: Tensor, terms: Terms, magnitude: bool) -> LowRank:
    """`summed`, for the weights of a stack one by one."""
    if W.ndim == 2:
        return summed(W, terms, magnitude)
    found = [summed(W[i], _of_weight(terms, i), magnitude) for i in range(len(W))]
    m = [f.m for f in found if f.m is not None]
    A, B = torch.stack([f.A for f in found]), torch.stack([f.B for f in found])
    return LowRank(A, B, m=torch.stack(m) if m else None)


def _distance(W: Tensor, terms: Terms, found: LowRank) -> float:
    """`distance`, the largest of a stack's weights."""
    if W.ndim == 2:
        return distance(W, terms, found)
    return max(distance(W[i], _of_weight(terms, i), of_weight(found, i)) for i in range(len(W)))


def _of_weight(terms: Terms, i: int) -> Terms:
    return [(strength, of_weight(f, i)) for strength, f in terms]


@torch.no_grad()
def _fill(adapter: Adapter, factors: Mapping[str, LowRank], terms: Mapping[str, Terms]) -> None:
    """Copies the factors, and measures what rounding has changed. Raises UnsupportedError."""
    for module, layer in adapter.layers.items():
        tensors = {"A": factors[module].A, "B": factors[module].B, "m": factors[module].m}
        live = layer.trainable()
        for tensor, parameter in live.items():
            value = tensors[tensor]
            assert value is not None
            parameter.copy_(value)
        stored = replace(layer.method.factors(layer), norm_grad=False)
        with loaded(layer.base.module):
            error = _distance(layer.base.weight(), terms[module], stored)
        limit = LIMIT[live["B"].dtype]
        if not error <= limit:
            raise UnsupportedError(
                f"combine: at {module!r} the sum is no {type(adapter.config).__name__} of this rank: "
                f"the weights would differ by {error:.1e} (relative, measured; allowed {limit:.0e}). "
                "Use weft.use(model, strengths), which computes the sum itself."
            )
