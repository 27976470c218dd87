"""`weft.load`: every tensor of the file is used, every tensor of the adapter is filled, or an error
names both sides.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from .. import methods
from ..errors import CheckpointError
from ..model.adapter import Adapter
from ..model.attach import Parts, attach_resolved
from ..model.state import base_only, find_state, unwrapped
from ..model.structure import targets
from .checkpoint import Checkpoint, LoadReport
from .drawn import FIXED, fixed_checksum
from .load_plan import LoadPlan
from .problems import refuse
from .read import read
from .same_base import compare_base


@overload
def load(
    model: nn.Module,
    path: str | Path,
    name: str = "default",
    strict: Literal[True] = True,
    *,
    replace: bool = False,
    other_base: bool = False,
) -> Adapter: ...
@overload
def load(
    model: nn.Module,
    path: str | Path,
    name: str = "default",
    *,
    strict: Literal[False],
    replace: bool = False,
    other_base: bool = False,
) -> LoadReport: ...
@overload
def load(
    model: nn.Module,
    path: str | Path,
    name: str = "default",
    strict: bool = True,
    *,
    replace: bool = False,
    other_base: bool = False,
) -> Adapter | LoadReport: ...
def load(
    model: nn.Module,
    path: str | Path,
    name: str = "default",
    strict: bool = True,
    *,
    replace: bool = False,
    other_base: bool = False,
) -> Adapter | LoadReport:
    """Attaches the adapter in the directory `path`, saved by Weft or by peft, fills it and makes it
    active.

    `path` may also be the directory of a `weft train` run; its adapter is loaded, and
    `load_report.notes` says from where.

    If strict, anything that does not fit raises CheckpointError and leaves the model unchanged;
    returns the handle (its `load_report` lists the names that were mapped). With strict=False,
    tensors that fit are filled and the rest keep their initial values; returns the LoadReport (with
    `.adapter` and `.problems`).

    A file of `weft.save` has numbers of its base's weights. If those of `model` are others, and not
    only cast or quantised, that is a problem, too; with other_base=True it becomes a note.

    replace=True: an adapter of that name is replaced, also while other threads use it, and what is
    active stays active. Each `with weft.use(...)` block, and outside of blocks each forward, gets the
    old adapter or the new one, never both: the replacement waits for the blocks that use the adapter,
    and new ones wait for it. The old handle is detached. If loading fails, the old adapter stays.

    Raises CheckpointError, UnsupportedError (a field or method of peft that Weft does not support),
    the errors of `weft.attach`, and with replace=True WeftError if an open block of this thread
    uses the adapter, or blocks of others do for a minute.
    """
    checkpoint = read(path, values=False)
    root = unwrapped(model)
    state = find_state(root)
    with base_only(state):
        plan = LoadPlan(root, checkpoint, strict)
        compare_base(plan, other_base)
    if strict:
        refuse(path, plan.problems)
    elif not plan.configs and not plan.selected and not plan.tokens:
        raise CheckpointError(
            f"{path} has nothing that fits this {type(root).__name__}:\n  "
            + "\n  ".join(plan.problems)
        )
    # In the order of the model.
    configs = {module: plan.configs[module] for module in plan.modules if module in plan.configs}
    weights = configs and not isinstance(plan.config, methods.PromptMethod)
    frozen, routed = targets.leftovers(plan.structure, configs) if weights else ([], [])

    def fill(adapter: Adapter) -> None:
        _fill(adapter, plan)
        _check_fixed(adapter, checkpoint, plan, path if strict else None)

    filled = {name for name in configs if _is_whole(configs[name], plan.values[name])}
    parts = Parts(configs, list(plan.selected), frozen, routed, filled)
    adapter = attach_resolved(plan.structure, plan.config, parts, name, plan.shared, fill, replace)
    adapter.loftq = checkpoint.loftq
    adapter.load_report = LoadReport(adapter, plan.problems, plan.mapped, plan.notes)
    return adapter if strict else adapter.load_report


def _is_whole(config: Any, values: Mapping[str, Tensor]) -> bool:
    return not config.file_shapes(1, 1).keys() - values.keys()


def _check_fixed(
    adapter: Adapter, checkpoint: Checkpoint, plan: LoadPlan, path: str | Path | None
) -> None:
    """Frozen tensors that were drawn again must be those of the saved adapter."""
    known, found = checkpoint.checksums.get(FIXED), fixed_checksum(adapter)
    if known == found:
        return
    if len(adapter.layers) < len(checkpoint.sites):
        plan.notes.append(
            "the frozen tensors of some layers alone cannot be held against the file's checksum of "
            "all"
        )
        return
    plan.problems.append(
        f"the frozen tensors drawn from seed {adapter.config.seed} have checksum {found}, and "
        f"{known} was saved: they belong to layers of other names, so what was trained means "
        "nothing with them"
    )
    if path is not None:
        refuse(path, plan.problems)


@torch.no_grad()
def _fill(adapter: Adapter, plan: LoadPlan) -> None:
    for name, layer in adapter.layers.items():
        live = layer.stored()
        for tensor, value in plan.values[name].items():
            live[tensor].copy_(value)
        if name in plan.reached:
            layer.method.load_extra_state(layer, plan.reached[name])
    for name, selected in adapter.selected_tensors.items():
        selected.trained.copy_(plan.selected[name])
    for name, rows in plan.tokens.items():
        adapter.token_layers[name].get_parameter("rows").copy_(rows)


__all__ = ["load", "read"]
