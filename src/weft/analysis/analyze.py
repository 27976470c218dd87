"""Delta M and delta D of every matrix at every checkpoint of some runs, and their correlation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from torch import nn

from .. import methods
from ..checkpoint.load import load
from ..checkpoint.same_base import SWITCH
from ..errors import CheckpointError, ConfigError
from ..model.detach import detach
from .changes import Change, changes_of
from .relate import Relation, relate
from .series import Series

NAME = "weft-analyze"  # of the adapter while it is on the model
EVERY = "all matrices"


@dataclass(frozen=True)
class Point:
    """One matrix at one checkpoint. `role` is its name in the block, for example
    "attention.query".
    """

    module: str
    role: str
    step: int
    delta_m: float
    delta_d: float


@dataclass(frozen=True)
class RunAnalysis:
    """One run. `relations` maps a role, or EVERY if there are several, to the three levels."""

    label: str
    method: str
    config: Mapping[str, Any]
    places: tuple[tuple[int, Path], ...]
    points: tuple[Point, ...]
    relations: Mapping[str, Sequence[Relation]]

    @property
    def steps(self) -> list[int]:
        return [step for step, _ in self.places]

    def of(self, role: str) -> list[Point]:
        """Returns the points of a role, or all."""
        return [p for p in self.points if role in (p.role, EVERY)]


@dataclass(frozen=True)
class Analysis:
    """Runs over the same matrices. `left_out` maps a label to the matrices that this run changes
    and another does not.
    """

    runs: tuple[RunAnalysis, ...]
    matrices: tuple[str, ...]
    left_out: Mapping[str, Sequence[str]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def analyze(model: nn.Module, series: Sequence[Series], targets: Sequence[str] = ()) -> Analysis:
    """Measures `series` against the base `model`, which is unchanged afterwards.

    Each checkpoint is loaded strictly, and its effective weights W' are compared with W in float64,
    one matrix at a time. Runs are compared over the matrices that all of them change. `targets`
    restricts them to these module name endings.

    Raises CheckpointError if a checkpoint does not fit the model, UnsupportedError if the method
    changes no weight matrix, and ConfigError if an ending matches nothing, if runs have no common
    matrix, or if one run has several methods.
    """
    if not series:
        raise ConfigError("analyze: give at least one run.")
    measured = [_measured(model, one) for one in series]
    kept = _common_matrices(series, [set(steps[0]) for _, steps in measured], targets)
    matrices = tuple(name for name in measured[0][1][0] if name in kept)
    left = {
        one.label: [name for name in steps[0] if name not in kept]
        for one, (_, steps) in zip(series, measured, strict=True)
    }
    runs = tuple(
        _run_analysis(one, config, steps, matrices)
        for one, (config, steps) in zip(series, measured, strict=True)
    )
    changes = [
        c for _, steps in measured for found in steps for name, c in found.items() if name in kept
    ]
    notes = _analysis_notes(runs, left, bool(targets), max(c.undirected for c in changes))
    return Analysis(
        runs, matrices, {label: names for label, names in left.items() if names}, tuple(notes)
    )


def _analysis_notes(
    runs: Sequence[RunAnalysis], left: Mapping[str, Sequence[str]], chosen: bool, undirected: int
) -> Iterator[str]:
    why = "not named by --targets" if chosen else "another run does not change them"
    yield from (
        f"{len(names)} matrices of {label!r} are left out: {why}."
        for label, names in left.items()
        if names
    )
    if undirected:
        yield f"up to {undirected} rows of a matrix are 0 and have no direction; they count in delta M only."
    for run in runs:
        if len(run.places) == 1:
            yield (
                f"{run.label!r} has one checkpoint, so there is no result over time (weft train "
                "writes one every save.every steps and keeps save.keep of them, by default all)."
            )


def _measured(model: nn.Module, one: Series) -> tuple[Any, list[dict[str, Change]]]:
    """The configuration, and module -> change at every checkpoint."""
    config: Any = None
    steps: list[dict[str, Change]] = []
    for _, path in one.places:
        adapter = _loaded(model, path)
        try:
            if config is not None and type(adapter.config) is not type(config):
                raise ConfigError(
                    f"{one.label!r} has adapters of {type(config).__name__} and, in "
                    f"{str(path)!r}, of "
                    f"{type(adapter.config).__name__}; give each run a label: LABEL=DIR."
                )
            config = adapter.config
            steps.append(dict(changes_of(adapter)))
        finally:
            detach(model, NAME)
        if steps[0].keys() != steps[-1].keys():
            odd = sorted(steps[0].keys() ^ steps[-1].keys())
            raise ConfigError(
                f"the checkpoints of {one.label!r} change different matrices: {odd[0]!r} is not in "
                "both "
                f"{str(one.places[0][1])!r} and {str(path)!r}. Give each run a label: LABEL=DIR."
            )
    return config, steps


def _loaded(model: nn.Module, path: Path) -> Any:
    try:
        return load(model, path, name=NAME)
    except CheckpointError as error:
        raise CheckpointError(
            str(error)
            .replace(
                "\nload(..., strict=False) fills what fits and returns a report.",
                "\nGive the model that it was trained on.",
            )
            .replace(f", or {SWITCH} to use this one", "")
        ) from error


def _common_matrices(
    series: Sequence[Series], changed: Sequence[set[str]], targets: Sequence[str]
) -> set[str]:
    """The matrices that all runs change, restricted to `targets`."""
    shared = set.intersection(*changed)
    if not shared:
        raise ConfigError(
            "the runs have no common matrix: "
            + "; ".join(
                f"{one.label!r} {sorted(names)[0]!r}"
                for one, names in zip(series, changed, strict=True)
            )
            + ", and others."
        )
    for ending in targets:
        if not any(_ends(name, ending) for name in shared):
            have = sorted({name.rpartition(".")[2] for name in shared})
            near = get_close_matches(ending, have, n=2) or have[:5]
            raise ConfigError(
                f"--targets {ending!r} matches none of the {len(shared)} changed matrices. "
                "Nearest: "
                f"{near}."
            )
    return {
        name for name in shared if not targets or any(_ends(name, ending) for ending in targets)
    }


def _ends(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")


def _run_analysis(
    one: Series, config: Any, steps: Sequence[Mapping[str, Change]], matrices: Sequence[str]
) -> RunAnalysis:
    roles = roles_of(matrices)
    points = tuple(
        Point(name, roles[name], step, found[name].delta_m, found[name].delta_d)
        for (step, _), found in zip(one.places, steps, strict=True)
        for name in matrices
    )
    names = list(dict.fromkeys(roles.values()))
    groups = names if len(names) == 1 else [*names, EVERY]
    relations = {}
    for role in groups:
        of_role = [p for p in points if role in (p.role, EVERY)]
        relations[role] = relate(
            [p.module for p in of_role], [p.delta_d for p in of_role], [p.delta_m for p in of_role]
        )
    return RunAnalysis(
        one.label, type(config).__name__, methods.to_json(config), one.places, points, relations
    )


def roles_of(modules: Sequence[str]) -> dict[str, str]:
    """Returns the role of each matrix: the part of its name after the last number. If no two
    matrices share a role, all have the same one.
    """
    found = {}
    for name in modules:
        parts = name.split(".")
        last = max((i for i, part in enumerate(parts) if part.isdigit()), default=-1)
        found[name] = ".".join(parts[last + 1 :]) or "layers"
    if len(set(found.values())) == len(modules):
        return dict.fromkeys(modules, "layers")
    return found
