"""VeRA in peft's layout, both ways: the vectors of each layer, and A and B once.

base_model.model.<module>.vera_lambda_b [out]   vera_lambda_d [r]   base_model.vera_A [r, in]   base_model.vera_B [out, r]
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import UnsupportedError
from ..methods import VeRA
from ..methods.projections import Projections
from ..model.adapter import Adapter
from .content import Stored, StoredSite, extra, take
from .peft_common import PREFIX, bare_keys, common_config, refuse_fields, rest_is_selected, selected_tensors

PEFT_TYPE = "VERA"
_NAMES = {"d": "vera_lambda_d", "b": "vera_lambda_b"}
_KEY = re.compile(r"(?P<module>.+)\.(?P<part>vera_lambda_[bd])(?P<adapter>\.[^.]+)?")
_MATRIX = re.compile(r"(base_model\.)?vera_(?P<which>[AB])(\.[^.]+)?")
_CARRIED = ("r", "projection_prng_key", "save_projection", "vera_dropout", "d_initial", "init_weights")


def write(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by key, A and B among them, and adapter_config.json. Raises UnsupportedError for what peft lacks."""
    config = adapter.config
    tensors: dict[str, Tensor] = {}
    shared: Projections | None = None
    for module, site in adapter.sites.items():
        if site.host.kind == "embedding":
            raise UnsupportedError(f"peft's VeRA has no form for the embedding {module!r}; save without projections=True.")
        for field in ("r", "seed", "draw"):
            if getattr(site.rule, field) != getattr(config, field):
                raise UnsupportedError(f"peft's VeRA has one {field} for all layers, and {module!r} has {field}="
                                       f"{getattr(site.rule, field)!r}; save without projections=True.")
        tensors |= {f"{PREFIX}{module}.{_NAMES[t]}": p.detach() for t, p in site.trainable().items()}
        shared = site.shared
    if shared is not None:
        tensors |= {"base_model.vera_A": shared.A.detach().float(), "base_model.vera_B": shared.B.detach().float()}
    return {**tensors, **selected_tensors(adapter)}, {
        **common_config(adapter), "peft_type": PEFT_TYPE, "r": config.r, "projection_prng_key": config.seed,
        "save_projection": True, "vera_dropout": config.dropout, "d_initial": config.d_init}


def read(config: Mapping[str, Any], tensors: dict[str, Tensor]) -> Stored:
    """What peft saved; without stored matrices they are redrawn as peft drew them."""
    refuse_fields(config, _CARRIED, "VeRA")
    matrices = {m["which"]: key for key in tensors if (m := _MATRIX.fullmatch(key))}
    stored = Stored(VeRA(
        r=config.get("r", 256), d_init=float(config.get("d_initial", 0.1)), dropout=float(config.get("vera_dropout") or 0.0),
        seed=config.get("projection_prng_key", 0), draw="stored" if len(matrices) == 2 else "peft",
        targets=config.get("target_modules") or "all-linear", modules_to_save=config.get("modules_to_save") or ()), "peft")
    stored.picks_layers = bool(config.get("layers_to_transform"))
    if config.get("save_projection", True) and len(matrices) < 2:
        stored.problems.append("missing: 'base_model.vera_A' and 'base_model.vera_B', which save_projection=true promises")
    _take_matrices(stored, tensors, matrices)
    read_tensors(stored, bare_keys(tensors, stored.notes), from_keys=True)
    return stored


def read_own(stored: Stored, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take A and B out of a file that Weft wrote in this layout; the rest has bare keys."""
    matrices = {m["which"]: key for key in tensors if (m := _MATRIX.fullmatch(key))}
    for which in "AB":
        if which not in matrices:
            stored.problems.append(f"missing: 'base_model.vera_{which}'")
    _take_matrices(stored, tensors, matrices)
    return bare_keys(tensors, stored.notes)


def read_tensors(stored: Stored, tensors: dict[str, Tensor], from_keys: bool = False) -> None:
    """Fill the sites from bare keys."""
    parsed = {key: match for key in tensors if (match := _KEY.fullmatch(key))}
    if from_keys:
        for match in parsed.values():
            stored.sites.setdefault(match["module"], StoredSite(stored.config, {}, {}))
    spelled = {(m["module"], m["part"]): key for key, m in parsed.items()}
    for module, site in stored.sites.items():
        for tensor, shape in site.rule.trained(*(site.shape or (1, 1))).items():
            key = spelled.get((module, _NAMES[tensor]), f"{module}.{_NAMES[tensor]}")
            found = take(tensors, key, shape if site.shape else None, f"{tensor} of {module!r}", stored.problems)
            site.keys[tensor] = PREFIX + key
            if found is not None:
                site.tensors[tensor] = found
    rest_is_selected(stored, tensors, stored.config.modules_to_save)
    stored.problems += extra(tensors, [f"{m}.{n}" for m in stored.sites for n in _NAMES.values()])


def _take_matrices(stored: Stored, tensors: dict[str, Tensor], matrices: Mapping[str, str]) -> None:
    found = {which: tensors.pop(key) for which, key in matrices.items()}
    if len(found) == 2:
        stored.matrices = found["A"].float(), found["B"].float()
