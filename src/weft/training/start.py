"""`adapter.start`: a run that begins with the tensors of another adapter, as the LoRA paper begins
MRPC, RTE and STS-B with its MNLI adapter (arXiv:2106.09685, appendix D.1).

A head that the base does not have is taken over if it has the shape of this run's head. If the
number of classes differs, the head is new, as in the paper.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint import files
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.drawn import FIXED, fixed_checksum
from ..checkpoint.load import read
from ..checkpoint.load_plan import LoadPlan
from ..checkpoint.problems import SHOWN
from ..checkpoint.same_base import compare_base
from ..errors import CheckpointError, ConfigError, WeftError
from ..methods import TensorConfig
from ..model.adapter import Adapter
from ..model.state import base_only, state_of, unwrapped
from ..model.structure import canonical
from .config import to_dict
from .config.sections import RunConfig
from .run_dir import RunDir, check_recorded_base

# Fields that may differ: the adapted layers are compared one by one; the others decide how tensors
# are initialised or trained, and not their meaning.
FREE = (
    "targets",
    "exclude",
    "within",
    "layers",
    "modules_to_save",
    "freeze_batch_norm",
    "new_tokens",
    "dropout",
    "init",
    "norm_grad",
    "dtype",
    "total_steps",
    "warm_up",
    "final",
    "interval",
    "orthogonality",
)


@dataclass(frozen=True)
class Start:
    """An adapter on the disk that fits the configuration, as far as that is known without the
    model.
    """

    path: str
    stored: Checkpoint
    fingerprint: str  # 16 hex digits over its tensors by name


def open_start(path: str, method: Any) -> Start:
    """Reads the adapter. Raises ConfigError if it cannot be read or is not of the method `method`."""
    folder = Path(path).expanduser()
    try:
        stored = read(folder)
    except WeftError as error:
        raise ConfigError(f"adapter.start={path!r}: {error}") from None
    if stored.problems:
        raise ConfigError(f"adapter.start={path!r} is damaged: {stored.problems[0]}")
    theirs, mine = type(stored.config).__name__, type(method).__name__
    if theirs != mine:
        raise ConfigError(
            f"adapter.start={path!r} is an adapter of {theirs}, and method.name is {mine}. Give "
            f"method.name={theirs}, or an adapter of {mine}."
        )
    _check_same_tensors(path, stored.config, method)
    drawn = bool(stored.checksums)  # frozen tensors that the seed decides
    for f in fields(method):
        there, here = (_value(config, f.name) for config in (stored.config, method))
        if f.name not in FREE and (f.name != "seed" or drawn) and there != here:
            raise ConfigError(
                f"adapter.start={path!r} was trained with method.{f.name}={there!r}, and this run "
                f"has {here!r}. Give method.{f.name}={there!r}."
            )
    return Start(path, stored, _fingerprint(stored))


def _check_same_tensors(path: str, there: Any, here: Any) -> None:
    """A start at a part of W gives the same tensors another meaning. Raises ConfigError."""
    wanted, have = (
        list(config.start_shapes(1, 1)) if isinstance(config, TensorConfig) else []
        for config in (there, here)
    )
    if wanted != have:
        raise ConfigError(
            f"adapter.start={path!r} was trained with method.init={there.init!r}, and this run has "
            f"{here.init!r}, whose tensors mean something else. Give method.init={there.init!r}."
        )


def check_base(start: Start, config: RunConfig, model: nn.Module, missing: Collection[str]) -> None:
    """Raises WeftError if the adapter's run recorded another base than `model`.

    The record is a checksum of all weights, which a cast changes. If that run loaded its base in
    another way than `config`, only the fingerprint in the file is compared (`load_start`).
    """
    place = Path(start.path).expanduser()
    run = files.run_of(place)
    if run is None:
        return
    theirs, mine = RunDir(run).read()["config"].get("model", {}), to_dict(config)["model"]
    same = all(theirs.get(key, mine[key]) == mine[key] for key in ("dtype", "quantize"))
    if same or start.stored.fingerprint is None:
        check_recorded_base(model, missing, [place])


@torch.no_grad()
def load_start(
    start: Start, adapter: Adapter, missing: Collection[str], other_base: bool = False
) -> dict[str, Any]:
    """Copies the tensors into the attached adapter and returns its record for run.json. `missing`:
    names of base tensors that are in no checkpoint. With `other_base` the weights may be others
    than the adapter's own base has.

    Raises CheckpointError, naming the tensor, if one of either side has no counterpart. Nothing has
    changed then.
    """
    root, stored = unwrapped(adapter.model), start.stored
    mine = adapter.selected_tensors
    head = {canonical(name): mine[name].trained for name in missing if name in mine}
    taken = bool(head) and all(
        name in stored.selected and stored.selected[name].shape == t.shape
        for name, t in head.items()
    )
    if not taken:
        stored.selected |= {name: t.detach().cpu().clone() for name, t in head.items()}  # its own
    with base_only(state_of(root)):
        plan = LoadPlan(root, stored)
        compare_base(plan, other_base, "set adapter.other_base: true")
    _refuse(start, [*plan.problems, *_left_over(adapter, plan), *_drawn_otherwise(adapter, stored)])
    adapter.loftq = stored.loftq
    for name, site in adapter.layers.items():
        live = site.stored()
        for tensor, value in plan.values[name].items():
            live[tensor].copy_(value)
    for name, rows in plan.tokens.items():
        adapter.token_layers[name].get_parameter("rows").copy_(rows)
    for name, value in plan.selected.items():
        mine[name].trained.copy_(value)
    return {
        "path": start.path,
        "fingerprint": start.fingerprint,
        "head": ("taken over" if taken else "new") if head else None,
        "notes": plan.notes,
    }


def describe(started: Mapping[str, Any]) -> str:
    """Returns the result of `load_start` as a sentence, for the log and the card."""
    head = {
        "taken over": "; its head is taken over",
        "new": "; the head is new, since that adapter has none or one for other classes",
        None: "",
    }[started["head"]]
    return (
        f"Begins with the adapter {started['path']} (fingerprint {started['fingerprint']}){head}."
    )


def _value(config: Any, name: str) -> Any:
    """The value of a field; alpha=None means r."""
    value = getattr(config, name)
    return float(config.r) if name == "alpha" and value is None else value


def _left_over(adapter: Adapter, plan: LoadPlan) -> list[str]:
    """Problems: what only one of the two trains, and layers with different fields."""
    found = []
    for name in [*adapter.layers, *(n for n in plan.configs if n not in adapter.layers)]:
        if name not in plan.configs:
            found.append(
                f"{name!r} is adapted in this run and not there; leave it out of method.targets"
            )
        elif name not in adapter.layers:
            found.append(
                f"{name!r} is adapted there and not in this run; name it in method.targets"
            )
        else:
            found += _unlike(name, adapter.layers[name], plan)
    found += [
        f"{name!r} was trained there and is not in this run; name its module in "
        "method.modules_to_save"
        for name in plan.selected
        if name not in adapter.selected_tensors
    ]
    ids = {name: layer.method.ids for name, layer in adapter.token_layers.items()}
    theirs = {name: ids for table in plan.tables for name, ids in [(table.name, table.ids)]}
    if theirs != {name: ids[name] for name in adapter.token_rows}:
        found.append("its new tokens are others than this run's; give it the same model.new_tokens")
    return found


def _drawn_otherwise(adapter: Adapter, stored: Checkpoint) -> list[str]:
    known = stored.checksums.get(FIXED)
    return (
        []
        if known in (None, fixed_checksum(adapter))
        else [
            (
                "its frozen tensors, drawn by layer and seed, are not those of this run: the layers "
                "have other names"
            )
        ]
    )


def _unlike(name: str, site: Any, plan: LoadPlan) -> list[str]:
    theirs, mine = plan.configs[name], site.method
    for f in fields(mine):
        there, here = (_value(rule, f.name) for rule in (theirs, mine))
        if f.name not in (*FREE, "seed") and there != here:
            return [
                (
                    f"{name!r} has {f.name}={there!r} there and {here!r} in this run; say the former "
                    "in method.targets"
                )
            ]
    if name in plan.reached and mine.extra_state(site) != plan.reached[name]:
        return [
            (
                f"{name!r} has lost a part of its rank there, which a new schedule of "
                f"{type(mine).__name__} would give "
                "again; begin without adapter.start"
            )
        ]
    return []


def _refuse(start: Start, problems: list[str]) -> None:
    if problems:
        more = [f"... and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        raise CheckpointError(
            f"adapter.start={start.path!r} does not fit this run:\n  "
            + "\n  ".join([*problems[:SHOWN], *more])
        )


def _fingerprint(stored: Checkpoint) -> str:
    tensors = {
        f"{module}.{tensor}": t
        for module, site in stored.sites.items()
        for tensor, t in site.tensors.items()
    }
    rows = {f"{module}.rows": t for module, t in stored.tokens.items()}
    text = "".join(
        f"{name} {files.checksum(t)}\n"
        for name, t in sorted({**tensors, **stored.selected, **rows}.items())
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]
