"""The long report as headings, paragraphs, tables and pictures, for page.py and markdown.py."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from ..plan.entries import format_rate
from ..plan.scale import Scale
from . import plots
from .comparison import Comparison, Row, Run
from .examples import Gap
from .paper_table import SideBySide
from .table import count, flat, legend, score_text, size, title
from .verdict import p_value, verdict_of


@dataclass(frozen=True)
class Table:
    """Cells as text. `strong` are the highlighted rows, `words` the columns with words instead of
    figures.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: Sequence[int] = (0,)
    strong: Sequence[int] = ()


@dataclass(frozen=True)
class Picture:
    """A PNG file in the folder of the report."""

    file: str
    caption: str


@dataclass(frozen=True)
class Items:
    """A bulleted list."""

    lines: Sequence[str]


@dataclass(frozen=True)
class Code:
    """A shell command."""

    text: str


@dataclass(frozen=True)
class Fold:
    """A table that a page can show collapsed under its title."""

    title: str
    table: Table
    open: bool


METRICS = (
    "Mean over the seeds, as each metric's own tool prints it; - is a metric that could not run."
)
REASON_LENGTH = 240  # characters of a reason; runs.csv has all of it

Part = str | Table | Picture | Items | Code | Fold


@dataclass(frozen=True)
class Section:
    """A heading and its contents."""

    title: str
    parts: Sequence[Part]


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The origin of a comparison: command, date, machine, versions."""

    command: str
    date: str
    machine: str
    versions: dict[str, str]


CAPTIONS = {
    plots.SCORES: "Score on the test split by trainable parameters (without a new head); bars "
    "are 95 % t-intervals.",
    plots.STEP_TIME: "Score on the test split by the time of a training step.",
    plots.MEMORY: "Score on the test split by the peak memory of a training step.",
    plots.RATES: "Validation score or loss by peak learning rate, mean of the tuning seeds; "
    "the test split is not used.",
    plots.CURVES: "Training loss of the scored runs: mean over the seeds, with a band from the "
    "lowest to the highest.",
}


def document(
    comparison: Comparison, origin: Origin, drawn: Sequence[str], paper: SideBySide | None = None
) -> list[Section]:
    """Returns all sections. `drawn` are the existing pictures; `paper` is the table of --like."""
    failed = [(row, run) for row in comparison.rows for run in row.runs if run.reason]
    sections = [
        Section("Recommendation", _recommendation(comparison)),
        Section("Table", [title(comparison), _results_table(comparison), *_remarks(comparison)]),
    ]
    if paper is not None:
        sections.append(Section(f"Under {paper.printed.title}", _paper_parts(paper)))
    if len(comparison.metrics) > 1:
        sections.append(Section("All metrics", [METRICS, _all_metrics(comparison)]))
    if drawn:
        sections.append(Section("Pictures", [Picture(name, CAPTIONS[name]) for name in drawn]))
    if failed:
        lines = [
            f"{row.label}, lr {format_rate(run.lr)}, seed {run.seed}, {_purpose(run)}: {_short_reason(run)}."
            for row, run in failed
        ]
        sections.append(Section("Failed runs", [Items(lines)]))
    later = [
        f"{row.label}, lr {format_rate(run.lr)}, seed {run.seed}, {_purpose(run)}, attempt {number}: "
        f"{_shorten(reason)}."
        for row in comparison.rows
        for run in row.runs
        for number, reason in enumerate(run.earlier, 1)
    ]
    if later:
        sections.append(Section("Failed attempts that were repeated", [Items(later)]))
    sections.append(Section("Every run", [*_run_folds(comparison)]))
    return [*sections, Section("How this was made", _origin_parts(comparison, origin))]


def _recommendation(comparison: Comparison) -> list[Part]:
    verdict = verdict_of(comparison)
    if verdict.recommended is None:
        return [f"{verdict.headline}: {verdict.why}"]
    return [f"{verdict.headline}.", verdict.why]


def _results_table(comparison: Comparison) -> Table:
    ranking = comparison.ranking()
    header = [
        "method",
        "trainable",
        "bytes",
        comparison.scored_by.label,
        "p (worse)",
        "points behind",
        "lr",
        "steps",
        "step ×",
        "step ms",
        "peak",
        "status",
    ]
    labels = [row.label for row in comparison.rows]
    return Table(
        header,
        [
            _row_cells(
                row, ranking.p.get(row.label) if ranking else None, comparison.gaps.get(row.label)
            )
            for row in comparison.rows
        ],
        (0, 11),
        [labels.index(name)] if (name := verdict_of(comparison).recommended) else [],
    )


def _row_cells(row: Row, p: float | None, gap: Gap | None) -> list[str]:
    ratio, seconds = row.cost.get("step_ratio"), row.cost.get("step_seconds")
    return [
        row.label,
        count(row.trainable),
        size(row.nbytes),
        score_text(row),
        "-" if p is None else p_value(p),
        _points_behind(gap),
        format_rate(row.lr) if row.lr else "-",
        count(row.steps),
        "-" if ratio is None else f"{ratio:.2f}",
        "-" if seconds is None else _milliseconds(seconds),
        size(row.cost.get("peak_bytes")),
        row.status,
    ]


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.0f}" if seconds >= 1 else f"{1000 * seconds:.3g}"


def _all_metrics(comparison: Comparison) -> Table:
    """Every metric of the test split, as the mean over the seeds."""
    return Table(
        ["method", *comparison.metrics],
        [
            [row.label, *(_mean_text(row.metrics.get(name, [])) for name in comparison.metrics)]
            for row in comparison.rows
        ],
    )


def _mean_text(scores: Sequence[float | None]) -> str:
    known = [score for score in scores if score is not None]
    return f"{sum(known) / len(known):.4f}" if known and len(known) == len(scores) else "-"


def _points_behind(gap: Gap | None) -> str:
    """The mean gap and its interval."""
    if gap is None:
        return "-"
    return f"{100 * gap.mean:.1f} ({100 * gap.interval[0]:.1f} to {100 * gap.interval[1]:.1f})"


def _remarks(comparison: Comparison) -> list[Part]:
    failed = [f"{row.label} failed: {flat(row.reason)}." for row in comparison.rows if row.reason]
    lines = [" ".join(line.split()) for line in legend(comparison)]
    if comparison.ranking():
        lines.append(
            "p (worse): corrected p-value of the test that the row is worse than the highest mean, "
            "over the seeds"
        )
    if comparison.gaps:
        lines.append(
            "points behind: distance to the highest mean, with the 95 % interval of a paired bootstrap "
            "over the test examples, for each row alone; a row that is significantly worse over the "
            "examples is not recommended either"
        )
    return [Items([*failed, *comparison.notes, *lines])]


def _paper_parts(paper: SideBySide) -> list[Part]:
    """The printed rows with the measured ones highlighted, and the differing conditions."""
    return [
        Table(paper.header, paper.cells, (0, 3), paper.ours),
        "Measured under different conditions:",
        Table(["condition", "paper", "here"], paper.differences, (0, 1, 2)),
        Items([*paper.printed.notes, f"Printed: {paper.printed.source}."]),
    ]


def _run_folds(comparison: Comparison) -> list[Fold]:
    folds = []
    for row in comparison.rows:
        failed = sum(run.reason is not None for run in row.runs)
        name = f"{row.label}: {len(row.runs)} runs" + (f", {failed} failed" if failed else "")
        table = Table(
            [
                "run",
                "lr",
                "seed",
                "steps",
                f"validation{_unit_suffix(comparison.chosen_by)}",
                f"test{_unit_suffix(comparison.scored_by)}",
                "seconds",
                "attempts",
                "status",
            ],
            [_run_cells(comparison, run) for run in row.runs],
            (0, 8),
        )
        folds.append(Fold(name, table, failed > 0))
    return folds


def _unit_suffix(scale: Scale) -> str:
    """ " %", or the metric's name if its scores are not percentages."""
    return scale.unit or f" {scale.label}"


def _run_cells(comparison: Comparison, run: Run) -> list[str]:
    seconds = "-" if run.seconds is None else f"{run.seconds:.1f}"
    status = run.status if run.reason is None else f"failed: {_short_reason(run)}"
    return [
        _purpose(run),
        format_rate(run.lr),
        str(run.seed),
        count(run.steps),
        comparison.chosen_by.number(run.validation),
        comparison.scored_by.number(run.test),
        seconds,
        str(run.attempts),
        status,
    ]


def _purpose(run: Run) -> str:
    return "scored" if run.purpose == "final" else "tuning"


def _short_reason(run: Run) -> str:
    return _shorten(run.reason)


def _shorten(reason: str | None) -> str:
    return textwrap.shorten(
        flat(reason), REASON_LENGTH, placeholder=" ... (runs.csv has all of it)"
    )


def _origin_parts(comparison: Comparison, origin: Origin) -> list[Part]:
    versions = ", ".join(f"{name} {version}" for name, version in origin.versions.items())
    head = f"Peak learning rate of the head, which every row trains: {format_rate(comparison.settings['head_lr'])}."
    recipe = (
        f"AdamW, weight decay {comparison.settings['weight_decay']:g}; the rate rises over "
        f"{comparison.settings['warm_up']:.3g} of the steps and then falls to 0, both linearly."
    )
    return [
        Code(origin.command),
        Items(
            [
                f"Written on {origin.date}.",
                f"Machine: {origin.machine}.",
                f"Versions: {versions}.",
                *([head] if comparison.head else []),
                recipe,
                f"Chosen by: {_chosen_by(comparison)}.",
            ]
        ),
    ]


def _chosen_by(comparison: Comparison) -> str:
    if comparison.chosen_by.lowest:
        return "lowest mean validation loss over the tuning seeds"
    return "mean validation score over the tuning seeds, then the lower loss"
