"""`--like NAME`: the scores that a paper prints, with our measured rows under them, and what
differs in the conditions.

printed.json holds the printed numbers with their sources. Only a task that is a column of the
paper's table can be laid under it. Which model, data, steps and protocol differ is said line by
line, since the numbers are never measured alike.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from . import report
from .results import Comparison, Row

PRINTED = Path(__file__).parent / "printed.json"
HERE = "here: "


@dataclass(frozen=True)
class Printed:
    """One table of a paper. columns: kind of task -> name of the column. rows: as in the file."""

    name: str
    title: str
    source: str
    columns: Mapping[str, str]
    conditions: Mapping[str, str]
    notes: Sequence[str]
    rows: Sequence[Mapping[str, Any]]

    def has(self, column: str) -> list[Mapping[str, Any]]:
        """The rows with a score in this column."""
        return [row for row in self.rows if column in row["scores"]]


@dataclass(frozen=True)
class Beside:
    """What is shown. cells: name, score, trainable, model of every row; ours: which are measured
    here; differences: condition, printed, here.
    """

    printed: Printed
    header: Sequence[str]
    cells: Sequence[Sequence[str]]
    ours: Sequence[int]
    differences: Sequence[tuple[str, str, str]]


@cache
def tables() -> dict[str, Printed]:
    """All printed tables by name."""
    held = json.loads(PRINTED.read_text(encoding="utf-8"))["tables"]
    return {name: Printed(name=name, **table) for name, table in held.items()}


def find_like(name: str, task: str) -> Printed:
    """The table of this name. Raises ConfigError: there is none, or `task` is no column of it."""
    known = tables()
    if name not in known:
        near = get_close_matches(name, known, n=3) or list(known)
        raise ConfigError(f"--like {name!r} is not known. Nearest: {', '.join(near)}.")
    table = known[name]
    if kind(task) not in table.columns:
        others = [other for other, held in known.items() if kind(task) in held.columns]
        fits = f" {task!r} stands in {', '.join(others)}." if others else ""
        raise ConfigError(
            f"--like {name}: the task here is {task!r}, and the columns of that table are "
            f"{', '.join(f'{kind}:DIR' for kind in table.columns)}.{fits}"
        )
    return table


def kind(task: str) -> str:
    """What a task's name begins with, whatever its protocol: sst2 of sst2-paper:DIR."""
    return task.partition(":")[0].removesuffix("-paper")


def lay(found: Comparison, table: Printed) -> Beside:
    """Our rows under the printed ones of the same method; those that the paper has no row for come
    last.
    """
    column = table.columns[kind(found.task)]
    printed = table.has(column)
    cells: list[list[str]] = []
    ours: list[int] = []

    def put(rows: Sequence[Row]) -> None:
        for row in rows:
            ours.append(len(cells))
            cells.append(
                [
                    HERE + row.label,
                    report.score(row),
                    report.count(row.trainable),
                    Path(found.model).name,
                ]
            )

    methods = list(dict.fromkeys(row["method"] for row in printed))
    for method in methods:
        cells += [
            [row["row"], _score(row["scores"][column]), row["trainable"], row["model"]]
            for row in printed
            if row["method"] == method
        ]
        put([row for row in found.rows if _method(row) == method])
    put([row for row in found.rows if _method(row) not in methods])
    header = (
        "row",
        column if column == found.metric else f"{column}: {found.metric}",
        "trainable",
        "model",
    )
    return Beside(table, header, cells, ours, _differences(found, table, printed))


def _method(row: Row) -> str:
    return str(row.config.get("method", row.label.split(" ")[0]))


def _score(cell: Sequence[float]) -> str:
    return f"{cell[0]:.1f}" + (f" ±{cell[1]:>4.1f}" if len(cell) > 1 else "")


def _differences(
    found: Comparison, table: Printed, printed: Sequence[Mapping[str, Any]]
) -> list[tuple[str, str, str]]:
    here = _conditions(found)
    models = ", ".join(dict.fromkeys(row["model"] for row in printed))
    return [
        ("model", models, here["model"]),
        *(
            (what, said, here.get(what, "as the notes of the comparison say"))
            for what, said in table.conditions.items()
        ),
    ]


def _conditions(found: Comparison) -> dict[str, str]:
    sizes, seeds = found.sizes, f"{found.seeds} seed{'s' * (found.seeds != 1)}"
    twice = found.task.partition(":")[0].endswith("-paper")
    return {
        "model": Path(found.model).name,
        "training data": f"{sizes.get('train', 0):,} examples",
        "steps": found.budget.removeprefix("budget: "),
        "learning rate": f"chosen for each method on {sizes.get('validation', 0):,} validation "
        "examples by the "
        f"{found.chosen_by.metric}, with other seeds",
        "seeds": f"{seeds}, the mean, each after its last step",
        "scored on": f"{sizes.get('test', 0):,} test examples"
        + (", on which the rate was chosen: optimistic" if twice else ", which no choice has seen"),
        "start": "the pretrained model",
        "adapted layers": _layers(found.rows),
        "±": "half of the 95 % t-interval over the seeds" if found.seeds > 1 else "none: one seed",
    }


def _layers(rows: Sequence[Row]) -> str:
    """Ranks and targets: "all-linear: LoRA r=8, VeRA r=256"."""
    held: dict[str, list[str]] = {}
    for row in rows:
        targets = row.config.get("targets")
        if targets is not None:
            shown = targets if isinstance(targets, str) else ", ".join(targets)
            rank = row.config.get("r")
            name = (
                row.label if rank is None or f"r={rank}" in row.label else f"{row.label} r={rank}"
            )
            held.setdefault(shown, []).append(name)
    return (
        "; ".join(f"{targets}: {', '.join(names)}" for targets, names in held.items())
        or "none of ours has targets"
    )


def text(beside: Beside) -> str:
    """For the terminal, at most 80 columns."""
    lines = [beside.header, *beside.cells]
    widths = [max(len(line[i]) for line in lines) for i in range(3)]
    room = report.WIDTH - sum(widths) - 6
    shown = [
        "  ".join(
            [
                line[0].ljust(widths[0]),
                line[1].rjust(widths[1]),
                line[2].rjust(widths[2]),
                line[3][:room],
            ]
        )
        for line in lines
    ]
    table = [shown[0], "-" * max(map(len, shown)), *shown[1:]]
    told = [
        report.wrap(f"- {what}: there {there}; here {here}", indent="  ")
        for what, there, here in beside.differences
    ]
    notes = [report.wrap(f"- {note}", indent="  ") for note in beside.printed.notes]
    title = report.wrap(f"Under {beside.printed.title} (--like {beside.printed.name})")
    source = report.wrap(f"Printed: {beside.printed.source}.")
    return "\n\n".join(
        [title, "\n".join(table), "\n".join(["Not measured alike:", *told, *notes]), source]
    )
