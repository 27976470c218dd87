"""`--like NAME`: the scores printed in a paper, with the measured rows under them, and the
differences between the conditions.

printed.json has the printed numbers and their sources. The task must be a column of the paper's
table. Model, data, steps and protocol always differ, so every difference is listed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from ...untrusted.printable import WIDTH
from .comparison import Comparison, Row
from .table import count, score_text, wrap

PRINTED = Path(__file__).parent / "printed.json"
HERE = "here: "


@dataclass(frozen=True)
class PaperTable:
    """One table of a paper. `columns` maps the kind of a task to a column's name; `rows` are as in
    the file.
    """

    name: str
    title: str
    source: str
    columns: Mapping[str, str]
    conditions: Mapping[str, str]
    notes: Sequence[str]
    rows: Sequence[Mapping[str, Any]]

    def rows_with(self, column: str) -> list[Mapping[str, Any]]:
        """Returns the rows with a score in this column."""
        return [row for row in self.rows if column in row["scores"]]


@dataclass(frozen=True)
class SideBySide:
    """Printed and measured rows.

    `cells` has name, score, trainable parameters and model per row, `ours` the numbers of the
    measured rows, and `differences` tuples (condition, in the paper, here).
    """

    printed: PaperTable
    header: Sequence[str]
    cells: Sequence[Sequence[str]]
    ours: Sequence[int]
    differences: Sequence[tuple[str, str, str]]


@cache
def paper_tables() -> dict[str, PaperTable]:
    """Returns all printed tables by name."""
    tables = json.loads(PRINTED.read_text(encoding="utf-8"))["tables"]
    return {name: PaperTable(name=name, **table) for name, table in tables.items()}


def find_paper_table(name: str, task: str) -> PaperTable:
    """Returns the table of this name. Raises ConfigError if there is none, or if `task` is not one
    of its columns.
    """
    known = paper_tables()
    if name not in known:
        near = get_close_matches(name, known, n=3) or list(known)
        raise ConfigError(f"--like {name!r} is not known. Nearest: {', '.join(near)}.")
    table = known[name]
    if task_kind(task) not in table.columns:
        others = [other for other, printed in known.items() if task_kind(task) in printed.columns]
        fits = f" {task!r} is a column of {', '.join(others)}." if others else ""
        raise ConfigError(
            f"--like {name}: the task here is {task!r}, and the columns of that table are "
            f"{', '.join(f'{kind}:DIR' for kind in table.columns)}.{fits}"
        )
    return table


def task_kind(task: str) -> str:
    """Returns the kind of a task without its protocol: sst2 for sst2-paper:DIR."""
    return task.partition(":")[0].removesuffix("-paper")


def side_by_side(comparison: Comparison, table: PaperTable) -> SideBySide:
    """Puts the measured rows under the printed ones of the same method, others last."""
    column = table.columns[task_kind(comparison.task)]
    printed = table.rows_with(column)
    cells: list[list[str]] = []
    ours: list[int] = []

    def add_ours(rows: Sequence[Row]) -> None:
        for row in rows:
            ours.append(len(cells))
            cells.append(
                [
                    HERE + row.label,
                    score_text(row),
                    count(row.trainable),
                    Path(comparison.model).name,
                ]
            )

    methods = list(dict.fromkeys(row["method"] for row in printed))
    for method in methods:
        cells += [
            [row["row"], _printed_score(row["scores"][column]), row["trainable"], row["model"]]
            for row in printed
            if row["method"] == method
        ]
        add_ours([row for row in comparison.rows if _method_of(row) == method])
    add_ours([row for row in comparison.rows if _method_of(row) not in methods])
    header = (
        "row",
        column if column == comparison.metric else f"{column}: {comparison.metric}",
        "trainable",
        "model",
    )
    return SideBySide(table, header, cells, ours, _differences(comparison, table, printed))


def _method_of(row: Row) -> str:
    return str(row.config.get("method", row.label.split(" ")[0]))


def _printed_score(cell: Sequence[float]) -> str:
    return f"{cell[0]:.1f}" + (f" ±{cell[1]:>4.1f}" if len(cell) > 1 else "")


def _differences(
    comparison: Comparison, table: PaperTable, printed: Sequence[Mapping[str, Any]]
) -> list[tuple[str, str, str]]:
    here = _conditions(comparison)
    models = ", ".join(dict.fromkeys(row["model"] for row in printed))
    return [
        ("model", models, here["model"]),
        *(
            (name, text, here.get(name, "see the notes of the comparison"))
            for name, text in table.conditions.items()
        ),
    ]


def _conditions(comparison: Comparison) -> dict[str, str]:
    sizes, seeds = comparison.sizes, f"{comparison.seeds} seed{'s' * (comparison.seeds != 1)}"
    twice = comparison.task.partition(":")[0].endswith("-paper")
    return {
        "model": Path(comparison.model).name,
        "training data": f"{sizes.get('train', 0):,} examples",
        "steps": comparison.budget.removeprefix("budget: "),
        "learning rate": f"chosen for each method on {sizes.get('validation', 0):,} validation "
        f"examples by the {comparison.chosen_by.metric}, with other seeds",
        "seeds": f"{seeds}, the mean, each after its last step",
        "scored on": f"{sizes.get('test', 0):,} test examples"
        + (", on which the rate was chosen: optimistic" if twice else ", not used for any choice"),
        "start": "the pretrained model",
        "adapted layers": _adapted_layers(comparison.rows),
        "±": "half of the 95 % t-interval over the seeds"
        if comparison.seeds > 1
        else "none: one seed",
    }


def _adapted_layers(rows: Sequence[Row]) -> str:
    """Ranks by targets: "all-linear: LoRA r=8, VeRA r=256"."""
    labels: dict[str, list[str]] = {}
    for row in rows:
        targets = row.config.get("targets")
        if targets is not None:
            shown = targets if isinstance(targets, str) else ", ".join(targets)
            rank = row.config.get("r")
            name = (
                row.label if rank is None or f"r={rank}" in row.label else f"{row.label} r={rank}"
            )
            labels.setdefault(shown, []).append(name)
    return (
        "; ".join(f"{targets}: {', '.join(names)}" for targets, names in labels.items())
        or "no measured row has targets"
    )


def side_by_side_text(paper: SideBySide) -> str:
    """Returns text for the terminal, at most 80 columns wide."""
    lines = [paper.header, *paper.cells]
    widths = [max(len(line[i]) for line in lines) for i in range(3)]
    width = WIDTH - sum(widths) - 6
    shown = [
        "  ".join(
            [
                line[0].ljust(widths[0]),
                line[1].rjust(widths[1]),
                line[2].rjust(widths[2]),
                line[3][:width],
            ]
        )
        for line in lines
    ]
    table = [shown[0], "-" * max(map(len, shown)), *shown[1:]]
    differences = [
        wrap(f"- {name}: paper {there}; here {here}", indent="  ")
        for name, there, here in paper.differences
    ]
    notes = [wrap(f"- {note}", indent="  ") for note in paper.printed.notes]
    title = wrap(f"Under {paper.printed.title} (--like {paper.printed.name})")
    source = wrap(f"Printed: {paper.printed.source}.")
    return "\n\n".join(
        [
            title,
            "\n".join(table),
            "\n".join(["Measured under different conditions:", *differences, *notes]),
            source,
        ]
    )
