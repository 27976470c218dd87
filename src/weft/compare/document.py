"""What the long report says, as headings, paragraphs, tables and pictures; page.py and markdown.py
write it down.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from . import plots
from .entries import rate
from .examples import Gap
from .like import Beside
from .report import count, flat, headline, legend, no_ranking, p_value, score, size, title, why
from .results import Comparison, Row, Run
from .scale import Scale


@dataclass(frozen=True)
class Table:
    """Cells as text. The rows of `strong` stand out; words (not figures) are in the columns of
    `words`.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: Sequence[int] = (0,)
    strong: Sequence[int] = ()


@dataclass(frozen=True)
class Picture:
    """A PNG file beside the report."""

    file: str
    caption: str


@dataclass(frozen=True)
class Items:
    lines: Sequence[str]


@dataclass(frozen=True)
class Code:
    text: str


@dataclass(frozen=True)
class Fold:
    """Details under a title of their own, which a page may show folded."""

    title: str
    table: Table
    open: bool


METRICS = (
    "Mean over the seeds, as each metric's own tool prints it; a metric that could not run is -."
)
REASON = 240  # characters of why a run failed; runs.csv has the whole

Part = str | Table | Picture | Items | Code | Fold


@dataclass(frozen=True)
class Section:
    title: str
    parts: Sequence[Part]


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a comparison comes from: the command, the day it was written down, machine,
    versions.
    """

    command: str
    date: str
    machine: str
    versions: dict[str, str]


CAPTIONS = {
    plots.SCORES: "Score on the test split against trainable parameters (without a new head); bars "
    "are 95 % t-intervals.",
    plots.STEP_TIME: "Score on the test split against the time of a training step.",
    plots.MEMORY: "Score on the test split against the most memory held in a training step.",
    plots.RATES: "Validation score or loss by peak learning rate, mean of the tuning seeds; "
    "without the test split.",
    plots.CURVES: "Training loss of the scored runs: mean over the seeds, and the band from the "
    "lowest to the highest.",
}


def document(
    found: Comparison, origin: Origin, drawn: Sequence[str], beside: Beside | None = None
) -> list[Section]:
    """All sections. `drawn` are the pictures that exist; `beside` is what --like asked for."""
    failed = [(row, run) for row in found.rows for run in row.runs if run.reason]
    sections = [
        Section("Recommendation", _recommendation(found)),
        Section("Table", [title(found), _table(found), *_remarks(found)]),
    ]
    if beside is not None:
        sections.append(Section(f"Under {beside.printed.title}", _beside(beside)))
    if len(found.metrics) > 1:
        sections.append(Section("All metrics", [METRICS, _metrics(found)]))
    if drawn:
        sections.append(Section("Pictures", [Picture(name, CAPTIONS[name]) for name in drawn]))
    if failed:
        lines = [
            f"{row.label}, lr {rate(run.lr)}, seed {run.seed}, {_purpose(run)}: {_reason(run)}."
            for row, run in failed
        ]
        sections.append(Section("Runs that failed", [Items(lines)]))
    later = [
        f"{row.label}, lr {rate(run.lr)}, seed {run.seed}, {_purpose(run)}, attempt {place}: "
        f"{_short(reason)}."
        for row in found.rows
        for run in row.runs
        for place, reason in enumerate(run.earlier, 1)
    ]
    if later:
        sections.append(Section("Attempts that failed and were made again", [Items(later)]))
    sections.append(Section("Every run", [*_runs(found)]))
    return [*sections, Section("How it was made", _origin(found, origin))]


def _recommendation(found: Comparison) -> list[Part]:
    ranking = found.ranking()
    return (
        [f"No ranking: {no_ranking(found)}"]
        if ranking is None
        else [f"{headline(ranking)}.", why(found, ranking)]
    )


def _table(found: Comparison) -> Table:
    ranking = found.ranking()
    header = [
        "method",
        "trainable",
        "bytes",
        found.scored_by.label,
        "p (worse)",
        "points behind",
        "lr",
        "steps",
        "step ×",
        "step ms",
        "peak",
        "status",
    ]
    labels = [row.label for row in found.rows]
    return Table(
        header,
        [
            _cells(row, ranking.p.get(row.label) if ranking else None, found.gaps.get(row.label))
            for row in found.rows
        ],
        (0, 11),
        [labels.index(ranking.recommended)] if ranking else [],
    )


def _cells(row: Row, p: float | None, gap: Gap | None) -> list[str]:
    ratio, seconds = row.cost.get("step_ratio"), row.cost.get("step_seconds")
    return [
        row.label,
        count(row.trainable),
        size(row.nbytes),
        score(row),
        "-" if p is None else p_value(p),
        _gap(gap),
        rate(row.lr) if row.lr else "-",
        count(row.steps),
        "-" if ratio is None else f"{ratio:.2f}",
        "-" if seconds is None else _milliseconds(seconds),
        size(row.cost.get("peak_bytes")),
        row.status,
    ]


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.0f}" if seconds >= 1 else f"{1000 * seconds:.3g}"


def _metrics(found: Comparison) -> Table:
    """Every metric of the test, the mean over the seeds."""
    return Table(
        ["method", *found.metrics],
        [
            [row.label, *(_mean(row.metrics.get(name, [])) for name in found.metrics)]
            for row in found.rows
        ],
    )


def _mean(scores: Sequence[float | None]) -> str:
    there = [score for score in scores if score is not None]
    return f"{sum(there) / len(there):.4f}" if there and len(there) == len(scores) else "-"


def _gap(gap: Gap | None) -> str:
    """Mean and interval."""
    if gap is None:
        return "-"
    return f"{100 * gap.mean:.1f} ({100 * gap.interval[0]:.1f} to {100 * gap.interval[1]:.1f})"


def _remarks(found: Comparison) -> list[Part]:
    failed = [f"{row.label} failed: {flat(row.reason)}." for row in found.rows if row.reason]
    lines = [" ".join(line.split()) for line in legend(found)]
    if found.ranking():
        lines.append(
            "p (worse): of the test that the row is worse than the highest mean, over the seeds, "
            "corrected"
        )
    if found.gaps:
        lines.append(
            "points behind: the highest mean, with the 95 % interval of a paired bootstrap over "
            "the test examples, "
            "each row by itself; a row that is significantly worse over the examples is not "
            "recommended either"
        )
    return [Items([*failed, *found.notes, *lines])]


def _beside(beside: Beside) -> list[Part]:
    """The printed rows with ours standing out, and what differs."""
    return [
        Table(beside.header, beside.cells, (0, 3), beside.ours),
        "Not measured alike:",
        Table(["condition", "there", "here"], beside.differences, (0, 1, 2)),
        Items([*beside.printed.notes, f"Printed: {beside.printed.source}."]),
    ]


def _runs(found: Comparison) -> list[Fold]:
    folds = []
    for row in found.rows:
        failed = sum(run.reason is not None for run in row.runs)
        name = f"{row.label}: {len(row.runs)} runs" + (f", {failed} failed" if failed else "")
        table = Table(
            [
                "run",
                "lr",
                "seed",
                "steps",
                f"validation{_unit(found.chosen_by)}",
                f"test{_unit(found.scored_by)}",
                "seconds",
                "attempts",
                "status",
            ],
            [_run_cells(found, run) for run in row.runs],
            (0, 8),
        )
        folds.append(Fold(name, table, failed > 0))
    return folds


def _unit(scale: Scale) -> str:
    """ " %", or the metric's name where the scores are in another unit."""
    return scale.unit or f" {scale.label}"


def _run_cells(found: Comparison, run: Run) -> list[str]:
    seconds = "-" if run.seconds is None else f"{run.seconds:.1f}"
    status = run.status if run.reason is None else f"failed: {_reason(run)}"
    return [
        _purpose(run),
        rate(run.lr),
        str(run.seed),
        count(run.steps),
        found.chosen_by.number(run.validation),
        found.scored_by.number(run.test),
        seconds,
        str(run.attempts),
        status,
    ]


def _purpose(run: Run) -> str:
    return "scored" if run.purpose == "final" else "tuning"


def _reason(run: Run) -> str:
    return _short(run.reason)


def _short(reason: str | None) -> str:
    return textwrap.shorten(flat(reason), REASON, placeholder=" ... (the whole is in runs.csv)")


def _origin(found: Comparison, origin: Origin) -> list[Part]:
    versions = ", ".join(f"{name} {version}" for name, version in origin.versions.items())
    head = f"Peak learning rate of the head, which every row trains: {rate(found.settings['head_lr'])}."
    recipe = (
        f"AdamW, weight decay {found.settings['weight_decay']:g}; the rate rises over "
        f"{found.settings['warm_up']:.3g} "
        "of the steps and then falls to 0, both linearly."
    )
    return [
        Code(origin.command),
        Items(
            [
                f"Written on {origin.date}.",
                f"Machine: {origin.machine}.",
                f"Versions: {versions}.",
                *([head] if found.head else []),
                recipe,
                f"Chosen by: {_chosen_by(found)}.",
            ]
        ),
    ]


def _chosen_by(found: Comparison) -> str:
    if found.chosen_by.lowest:
        return "lowest mean validation loss over the tuning seeds"
    return "mean validation score over the tuning seeds, then the lower loss"
