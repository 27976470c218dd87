"""`weft.load`: every tensor of the file lands, every tensor of the adapter is filled, or an error
names both sides.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from .. import methods
from ..errors import CheckpointError, ConfigError, UnsupportedError
from ..model import targets
from ..model.adapter import Adapter
from ..model.attach import Parts, attach_resolved
from ..model.state import base_only, find_state, unwrapped
from . import files, header, native, peft_adalora, peft_common, peft_lora, peft_prompt, peft_vera
from .content import LoadReport, Stored, refuse, report_extra
from .placement import Placement
from .save import NATIVE

FROM_PEFT: dict[str, Any] = {
    codec.PEFT_TYPE: codec
    for codec in (peft_lora, peft_vera, peft_adalora, peft_prompt.PREFIX, peft_prompt.PROMPT)
}


@overload
def load(
    model: nn.Module, path: str | Path, name: str = "default", strict: Literal[True] = True
) -> Adapter: ...
@overload
def load(
    model: nn.Module, path: str | Path, name: str = "default", *, strict: Literal[False]
) -> LoadReport: ...
@overload
def load(
    model: nn.Module, path: str | Path, name: str = "default", strict: bool = True
) -> Adapter | LoadReport: ...
def load(
    model: nn.Module, path: str | Path, name: str = "default", strict: bool = True
) -> Adapter | LoadReport:
    """Attach the adapter saved in the directory `path`, by Weft or by peft, fill it and make it
    active.

    strict: anything that does not fit raises CheckpointError and leaves the model as it was; the
    handle is returned (its `load_report` says which names were mapped). strict=False: what fits is
    filled, the rest keeps its starting values, and the LoadReport (with `.adapter` and `.problems`)
    is returned.

    Raises CheckpointError, UnsupportedError (a peft field or method that Weft does not carry), and
    what attach raises.
    """
    stored = read(path)
    root = unwrapped(model)
    state = find_state(root)
    with base_only(state):
        plan = Placement(root, stored)
    if strict:
        refuse(path, plan.problems)
    elif not plan.rules and not plan.selected:
        raise CheckpointError(
            f"{path} has nothing that fits this {type(root).__name__}:\n  "
            + "\n  ".join(plan.problems)
        )
    rules = {
        module: plan.rules[module] for module in plan.modules if module in plan.rules
    }  # in the model's order
    weights = rules and not isinstance(plan.config, methods.PromptMethod)
    frozen, routed = targets.leftovers(root, rules) if weights else ([], [])

    def fill(adapter: Adapter) -> None:
        _fill(adapter, plan)
        _check_fixed(adapter, stored, plan, path if strict else None)

    parts = Parts(rules, list(plan.selected), frozen, routed)
    adapter = attach_resolved(model, plan.config, parts, name, plan.shared, fill)
    adapter.load_report = LoadReport(adapter, plan.problems, plan.mapped, plan.notes)
    return adapter if strict else adapter.load_report


def read(path: str | Path) -> Stored:
    """Read a checkpoint without a model. Faults within the file are `problems`; an unreadable one
    raises.
    """
    while True:
        tensors_file, config_file = files.find(path)
        before = files.identity(tensors_file)
        try:
            stored = _read(tensors_file, config_file)
        except (CheckpointError, UnsupportedError):
            if files.identity(tensors_file) == before:
                raise
        else:
            if files.identity(tensors_file) == before:
                return stored
        # It was saved anew meanwhile. The library opens the file more than once, so two files may
        # have been mixed.


def _read(tensors_file: Path, config_file: Path | None) -> Stored:
    tensors, metadata = files.read_tensors(tensors_file)
    if header.is_ours(metadata):
        return _read_own(tensors_file, config_file, tensors, metadata)
    if config_file is None:
        raise CheckpointError(
            f"{tensors_file.parent} has no {files.CONFIG}, which says what the tensors are."
        )
    config = files.read_config(config_file)
    kind = config.get("peft_type")
    if isinstance(kind, str) and kind.startswith("WEFT_"):
        raise CheckpointError(
            f"{tensors_file} has lost the header that Weft wrote into it; some tool has written "
            "the file "
            "anew without its metadata. Use the original."
        )
    if not isinstance(kind, str) or kind not in FROM_PEFT:
        raise UnsupportedError(
            f"{config_file} says peft_type={kind!r}; Weft reads {list(FROM_PEFT)}."
        )
    try:
        stored: Stored
        stored, rest = FROM_PEFT[kind].read(config, tensors)
    except (ConfigError, TypeError, ValueError, AttributeError, re.error) as error:
        raise CheckpointError(f"{config_file}: {error}") from None
    if not stored.sites:
        stored.problems.append(
            f"the file holds no tensor of peft's {kind}; its names begin with {sorted(tensors)[:3]}"
        )
    peft_common.take_base_tensors(stored, rest, stored.config.modules_to_save)
    report_extra(
        stored, rest, [key for site in stored.sites.values() for key in site.keys.values()]
    )
    return stored


def _read_own(
    tensors_file: Path,
    config_file: Path | None,
    tensors: dict[str, Tensor],
    metadata: Mapping[str, str],
) -> Stored:
    stored, layout, manifest = header.read(tensors_file, metadata)
    header.check_tensors(stored, tensors, manifest, metadata["weft_checksums"])
    if config_file is None:
        stored.notes.append(
            f"{files.CONFIG} is missing; the configuration in the tensors' file was used"
        )
    else:
        header.check_config(config_file, manifest["adapter_config"], stored)
    stored.peft_reads_it = layout != NATIVE
    if layout == NATIVE:
        native.read(stored, tensors, manifest["selected"])
        return stored
    if layout not in FROM_PEFT:
        raise CheckpointError(
            f"{tensors_file} has the layout {layout!r}, which this Weft does not know. Update weft."
        )
    if isinstance(codec := FROM_PEFT[layout], peft_prompt.Codec):
        codec.fill(stored, tensors)
        report_extra(stored, tensors, [peft_prompt.KEY])
        return stored
    present = set(tensors)
    if layout == peft_vera.PEFT_TYPE:
        peft_vera.take_matrices(stored, tensors)
    bare = {key.removeprefix(peft_common.PREFIX): t for key, t in tensors.items()}
    for module, site in stored.sites.items():
        keys = {
            t: FROM_PEFT[layout].key(module, t, site.kind)
            for t in site.rule.shapes(*(site.shape or (1, 1)))
        }
        peft_common.take_trained(
            stored, bare, module, {t: k.removeprefix(peft_common.PREFIX) for t, k in keys.items()}
        )
    native.take_selected(stored, bare, "", manifest["selected"])
    stored.repeated = bare
    told = {key for site in stored.sites.values() for key in site.keys.values()}
    told |= {peft_common.PREFIX + name for name in manifest["selected"]}
    stored.problems += [
        f"missing: {key!r} was saved with this adapter"
        for key in manifest["keys"]
        if key not in present and key not in told and not peft_vera.is_matrix(key)
    ]
    return stored


def _check_fixed(
    adapter: Adapter, stored: Stored, plan: Placement, path: str | Path | None
) -> None:
    """Frozen tensors that were drawn again are those of the saved adapter."""
    known, found = stored.checksums.get(header.FIXED), header.fixed_checksum(adapter)
    if known == found:
        return
    if len(adapter.layers) < len(stored.sites):
        plan.notes.append(
            "the frozen tensors of some layers alone cannot be held against the file's checksum of "
            "all"
        )
        return
    plan.problems.append(
        f"the frozen tensors drawn from seed {adapter.config.seed} have checksum {found}, and "
        f"{known} was "
        "saved: they belong to layers of other names, so what was trained means nothing with them"
    )
    if path is not None:
        refuse(path, plan.problems)


@torch.no_grad()
def _fill(adapter: Adapter, plan: Placement) -> None:
    for name, site in adapter.layers.items():
        live = site.trainable()
        for tensor, value in plan.values[name].items():
            live[tensor].copy_(value)
        if name in plan.reached:
            site.method.load_extra_state(site, plan.reached[name])
    for name, selected in adapter.selected_tensors.items():
        selected.trained.copy_(plan.selected[name])


__all__ = ["load", "read"]
