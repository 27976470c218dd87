"""VeRA in peft's layout, both ways: the vectors of each layer, and A and B once.

base_model.model.<module>.vera_lambda_b [out]   vera_lambda_d [r]   base_model.vera_A [r, in]   base_model.vera_B [out, r]
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..methods import VeRA
from ..methods.projections import Projections
from ..model.adapter import Adapter
from ..model.structure import canonical
from .content import Stored, StoredSite, take
from .header import trained_tensors
from .peft_common import (
    PREFIX,
    bare_keys,
    common_config,
    dtype_of,
    fill_in,
    refuse_fields,
    take_trained,
    targets_of,
)

PEFT_TYPE = "VERA"
_NAMES = {"d": "vera_lambda_d", "b": "vera_lambda_b"}
_PARTS = {name: tensor for tensor, name in _NAMES.items()}
_KEY = re.compile(rf"(?P<module>.+)\.(?P<part>{'|'.join(_PARTS)})(\.[^.]+)?")
_MATRIX = re.compile(r"((module|_orig_mod)\.)*base_model\.vera_(?P<which>[AB])(\.[^.]+)?")
_CARRIED = (
    "r",
    "projection_prng_key",
    "save_projection",
    "vera_dropout",
    "d_initial",
    "init_weights",
)


def write(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The layers' tensors and A and B by key, and adapter_config.json. Raises UnsupportedError for
    what peft lacks.
    """
    config = adapter.config
    tensors: dict[str, Tensor] = {}
    for name, site in adapter.layers.items():
        if site.base.kind == "embedding":
            raise UnsupportedError(
                f"peft's VeRA has no form for the embedding {name!r}; save without "
                "projections=True."
            )
        for field in ("r", "seed", "draw"):
            if getattr(site.method, field) != getattr(config, field):
                raise UnsupportedError(
                    f"peft's VeRA has one {field} for all layers, and {name!r} has {field}="
                    f"{getattr(site.method, field)!r}; save without projections=True."
                )
        tensors |= {
            key(canonical(name), t, site.base.kind): value
            for t, value in trained_tensors(site).items()
        }
        tensors |= _matrices(site.shared)
    return tensors, {**common_config(adapter), **fields(config, {})}


def fields(config: VeRA, rules: Mapping[str, Any]) -> dict[str, Any]:
    """What adapter_config.json says of the method; all layers share its one rank and seed."""
    return {
        "peft_type": PEFT_TYPE,
        "r": config.r,
        "projection_prng_key": config.seed,
        "save_projection": True,
        "vera_dropout": config.dropout,
        "d_initial": config.d_init,
    }


def key(module: str, tensor: str, kind: str | None) -> str:
    """The key of one tensor in the file."""
    return f"{PREFIX}{module}.{_NAMES[tensor]}"


def _matrices(shared: Any) -> dict[str, Tensor]:
    """A and B in float32: drawn afresh where the model's dtype has rounded those in memory."""
    if shared.draw != "stored" and shared.A.dtype != torch.float32:
        shared = Projections(
            shared.r, shared.max_in, shared.max_out, shared.seed, shared.draw, shared.A.device
        )
    return {
        "base_model.vera_A": shared.A.detach().float(),
        "base_model.vera_B": shared.B.detach().float(),
    }


def read(config: Mapping[str, Any], tensors: dict[str, Tensor]) -> tuple[Stored, dict[str, Tensor]]:
    """What peft saved, and the tensors that belong to no layer. Without matrices they are redrawn
    as peft drew them.
    """
    refuse_fields(config, _CARRIED, "VeRA")
    has_matrices = any(is_matrix(name) for name in tensors)
    stored = Stored(
        VeRA(
            r=config.get("r", 256),
            d_init=float(config.get("d_initial", 0.1)),
            dropout=float(config.get("vera_dropout") or 0.0),
            seed=config.get("projection_prng_key", 0),
            draw="stored" if has_matrices else "peft",
            targets=targets_of(config),
            modules_to_save=config.get("modules_to_save") or (),
            dtype=dtype_of(tensors),
        ),
        "peft",
    )
    tensors = dict(tensors)
    if has_matrices or config.get("save_projection", True):
        take_matrices(stored, tensors)
    rest = bare_keys(stored, tensors)
    spelled: dict[str, dict[str, str]] = {}
    for name in rest:
        if match := _KEY.fullmatch(name):
            spelled.setdefault(match["module"], {})[_PARTS[match["part"]]] = name
            stored.sites.setdefault(match["module"], StoredSite(stored.config))
    for module, found in spelled.items():
        usual = {t: key(module, t, None).removeprefix(PREFIX) for t in _NAMES}
        take_trained(stored, rest, module, {**usual, **found})
    fill_in(stored, config)
    return stored, rest


def is_matrix(name: str) -> bool:
    return _MATRIX.fullmatch(name) is not None


def take_matrices(stored: Stored, tensors: dict[str, Tensor]) -> None:
    """Move A and B out of the tensors."""
    spelled = {m["which"]: name for name in tensors if (m := _MATRIX.fullmatch(name))}
    A, B = (
        take(
            tensors,
            spelled.get(which, f"base_model.vera_{which}"),
            None,
            f"VeRA's {which}",
            stored.problems,
        )
        for which in "AB"
    )
    if A is not None and B is not None:
        stored.matrices = A.float(), B.float()
