"""A and B of VeRA on loading: those of the file, or drawn again and compared with the checksum that
was saved.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..methods.projections import Projections
from ..model.state import State
from .checkpoint import Checkpoint
from .drawn import check_drawn, shared_checksum, shared_key

Shapes = list[tuple[int, int]]  # (out, in) of each layer


def projections_for(
    checkpoint: Checkpoint,
    shapes: Mapping[str, tuple[int, ...]],
    device: torch.device,
    state: State | None,
    problems: list[str],
    draw: bool = True,
) -> dict[Any, Projections]:
    """Returns the matrices of every share key. `shapes` are those of the layers that the model has.

    They are drawn for all layers of the file, even those that the model lacks: the largest decides
    every value. Faults are added to `problems`. With draw=False, only those of the file are
    returned.
    """
    groups: dict[Any, Shapes] = {}
    configs: dict[Any, Any] = {}
    for module, layer in checkpoint.sites.items():
        shape, key = layer.shape or shapes.get(module), layer.rule.share_key()
        if key is not None and shape is not None:
            configs.setdefault(key, layer.rule)
            groups.setdefault(key, []).append((shape[-2], shape[-1]))
    unknown = checkpoint.projections is None and any(
        s.shape is None and m not in shapes for m, s in checkpoint.sites.items()
    )
    if groups and unknown:
        problems.append(
            "VeRA's A and B were drawn again for the layers that the model has; had one of the "
            "others been larger, they would be other matrices"
        )
    found = {
        key: _of_key(checkpoint, configs[key], groups[key], device, state, problems, draw)
        for key in groups
    }
    return {key: shared for key, shared in found.items() if shared is not None}


def _of_key(
    checkpoint: Checkpoint,
    config: Any,
    shapes: Shapes,
    device: torch.device,
    state: State | None,
    problems: list[str],
    draw: bool,
) -> Projections | None:
    out, in_ = max(o for o, _ in shapes), max(i for _, i in shapes)
    if checkpoint.projections is not None:
        A, B = checkpoint.projections
        if not (
            A.ndim == B.ndim == 2
            and A.shape[0] == B.shape[1] == config.r
            and A.shape[1] >= in_
            and B.shape[0] >= out
        ):
            problems.append(
                f"'base_model.vera_A' {list(A.shape)} and 'base_model.vera_B' {list(B.shape)} in "
                f"the file, at least [{config.r}, {in_}] and [{out}, {config.r}] expected"
            )
            return None
        given = Projections(config.r, A.shape[1], B.shape[0], config.seed, "stored", stored=(A, B))
        _check_sum(checkpoint, config, given, problems)
        if config.draw == "stored":
            return given.to(device)
    if config.draw == "stored":
        return None  # that the file lacks them is among the problems
    shared = _on_model(state, (config.share_key(), out, in_, device))
    if shared is None and not draw:
        return None
    if shared is None:
        check_drawn(config, out, in_)
        shared = Projections(config.r, in_, out, config.seed, config.draw, device)
    _check_sum(checkpoint, config, shared, problems)
    return shared


def _check_sum(
    checkpoint: Checkpoint, config: Any, shared: Projections, problems: list[str]
) -> None:
    known, found = checkpoint.checksums.get(shared_key(config)), shared_checksum(shared)
    if known != found and checkpoint.writer == "weft":
        problems.append(
            f"VeRA's A and B (seed {config.seed}, r={config.r}) have checksum {found}, and {known} was "
            "saved: these are other matrices, so the vectors mean nothing with them"
        )


def _on_model(state: State | None, key: tuple[Any, ...]) -> Projections | None:
    """The same matrices if an adapter on the model has them already: they exist once per model."""
    layers = (
        [layer for adapter in state.adapters.values() for layer in adapter.layers.values()]
        if state
        else []
    )
    return next(
        (
            s.shared
            for s in layers
            if isinstance(s.shared, Projections) and s.shared.pool_key() == key
        ),
        None,
    )
