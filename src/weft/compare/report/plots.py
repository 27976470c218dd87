"""The pictures of a comparison: score by cost, learning rates, and training curves."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .comparison import Comparison, Row
from .labels import label_ends, label_points

SCORES, STEP_TIME, MEMORY, RATES, CURVES = (
    "scores.png",
    "step-time.png",
    "memory.png",
    "learning-rates.png",
    "curves.png",
)
# Small, so that the text is legible on a phone.
SIZE, DPI = (6.4, 4.0), 187.5
# Okabe and Ito's colours, which colour-blind readers can distinguish. With more rows than colours,
# line styles distinguish them.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", ":", "-.")
GREY = "#666666"
Paint = Callable[[Any, Comparison, Sequence[Row]], None]


def draw(comparison: Comparison, out: Path) -> list[str]:
    """Writes the pictures into `out` and returns their names.

    A picture shows the rows that have its data. A picture without any is not written, and an old
    one is deleted.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = []
    with mpl.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 10}):
        for name, paint, rows in _pictures(comparison):
            (out / name).unlink(missing_ok=True)
            if rows:
                figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
                FigureCanvasAgg(figure)  # not pyplot: nothing global, no display
                paint(figure.subplots(), comparison, rows)
                _save(figure, out / name)
                drawn.append(name)
    return drawn


def _pictures(comparison: Comparison) -> list[tuple[str, Paint, list[Row]]]:
    scored = [row for row in comparison.rows if row.complete]
    return [
        (SCORES, _scores, scored),
        (STEP_TIME, _step_time, [row for row in scored if "step_ratio" in row.cost]),
        (MEMORY, _memory, [row for row in scored if "peak_bytes" in row.cost]),
        (
            RATES,
            _learning_rates,
            [
                row
                for row in comparison.rows
                if any(score is not None for score in row.tried.values())
            ],
        ),
        (CURVES, _curves, [row for row in scored if row.curves]),
    ]


def _save(figure: Any, path: Path) -> None:
    """Writes atomically. Without a date, so that equal data give equal files."""
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png", metadata={"Software": None})
    temporary.replace(path)


def _look(comparison: Comparison, row: Row) -> dict[str, Any]:
    """Color and line style of a row, the same in all pictures."""
    index = [other.label for other in comparison.rows].index(row.label)
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": STYLES[index // len(COLOURS) % len(STYLES)],
    }


def _scores(axes: Any, comparison: Comparison, rows: Sequence[Row]) -> None:
    """Score by trained parameters. A row that trains only the head is a horizontal line, since the
    axis is logarithmic.
    """
    for row in rows:
        if not row.trainable:
            axes.axhline(_percent(row.mean), color=GREY, linewidth=1, linestyle="--", zorder=1)
            axes.annotate(
                f"{row.label} (head only)",
                (1, _percent(row.mean)),
                (-2, 3),
                color=GREY,
                ha="right",
                fontsize=9,
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
            )
    points = [(row, float(row.trainable)) for row in rows if row.trainable]
    axes.set_xlabel("trainable parameters" + (", without the head" if comparison.head else ""))
    _against(axes, comparison, points, _parameter_axis)


def _step_time(axes: Any, comparison: Comparison, rows: Sequence[Row]) -> None:
    axes.set_xlabel("time of a training step, relative to the frozen-base limit")
    _against(axes, comparison, [(row, float(row.cost["step_ratio"])) for row in rows], _plain_axis)


def _memory(axes: Any, comparison: Comparison, rows: Sequence[Row]) -> None:
    axes.set_xlabel("peak memory of a training step, MiB")
    _against(axes, comparison, [(row, row.cost["peak_bytes"] / 2**20) for row in rows], _plain_axis)


def _against(
    axes: Any,
    comparison: Comparison,
    points: Sequence[tuple[Row, float]],
    scale: Callable[[Any], None],
) -> None:
    """Mean test scores with their intervals, by a cost of the method."""
    for row, x in points:
        axes.errorbar(
            x,
            _percent(row.mean),
            yerr=_half(row),
            fmt="o",
            capsize=4,
            markersize=6,
            color=_look(comparison, row)["color"],
            zorder=3,
        )
    if points:
        scale(axes)
    axes.set_ylabel(
        f"{comparison.metric} on the test split" + (", %" if comparison.scored_by.unit else "")
    )
    _title(
        axes,
        comparison,
        "mean"
        + (
            f" and 95 % t-interval over {comparison.seeds} seeds"
            if comparison.seeds > 1
            else " of one seed"
        ),
    )
    label_points(
        axes,
        [(x, _percent(row.mean), row.label, _look(comparison, row)["color"]) for row, x in points],
        [_half(row) or 0.0 for row, _ in points],
    )


def _title(axes: Any, comparison: Comparison, what: str) -> None:
    axes.set_title(
        textwrap.fill(f"{comparison.task} on {comparison.model}: {what}", 66), fontsize=10
    )
    axes.grid(alpha=0.25, which="major")


def _plain_axis(axes: Any) -> None:
    axes.margins(x=0.12)


def _parameter_axis(axes: Any) -> None:
    """A logarithmic axis labelled 2k, 5k, 10k for 2,000 and so on; 2 and 5 have labels in a short
    range.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.margins(x=0.12)
    low, high = axes.get_xlim()
    short = high / low < 200
    label = FuncFormatter(lambda value, index: short_count(value))
    axes.xaxis.set_major_formatter(label)
    axes.xaxis.set_minor_locator(LogLocator(subs=(2, 5) if short else tuple(range(2, 10))))
    axes.xaxis.set_minor_formatter(label if short else NullFormatter())


def short_count(value: float) -> str:
    """Returns 10k for ten thousand, 5M, 7B."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _learning_rates(axes: Any, comparison: Comparison, rows: Sequence[Row]) -> None:
    """Mean validation score of every rate. The chosen rate has a ring; a failed one is a cross at
    the worst score.
    """
    factor = comparison.chosen_by.factor
    scores = [factor * score for row in rows for score in row.tried.values() if score is not None]
    worst = max(scores) if comparison.chosen_by.lowest else min(scores)
    for row in rows:
        look = _look(comparison, row)
        known = sorted((lr, factor * score) for lr, score in row.tried.items() if score is not None)
        axes.plot(
            *zip(*known, strict=True),
            marker="o",
            markersize=4,
            linewidth=1.4,
            label=row.label,
            **look,
        )
        chosen = [point for point in known if point[0] == row.lr]
        failed = [lr for lr, score in row.tried.items() if score is None]
        axes.plot(
            [x for x, _ in chosen],
            [y for _, y in chosen],
            marker="o",
            markersize=11,
            fillstyle="none",
            linestyle="none",
            color=look["color"],
        )
        axes.plot(
            failed,
            [worst] * len(failed),
            marker="x",
            markersize=8,
            linestyle="none",
            color=look["color"],
        )
    axes.set_xscale("log")
    axes.set_xlabel("peak learning rate (ringed: chosen; cross: training failed)")
    unit = (
        " (lower is better)"
        if comparison.chosen_by.lowest
        else ", %"
        if comparison.chosen_by.unit
        else ""
    )
    axes.set_ylabel(f"{comparison.chosen_by.metric} on validation{unit}")
    _title(
        axes,
        comparison,
        f"validation {'loss' if comparison.chosen_by.lowest else 'score'} by learning rate",
    )
    axes.figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)


def _curves(axes: Any, comparison: Comparison, rows: Sequence[Row]) -> None:
    """Smoothed mean over the seeds, with a band from the lowest to the highest seed."""
    from matplotlib.ticker import LogFormatter

    window = max(1, min(len(row.curves[0]) for row in rows) // 15)
    ends = []
    for row in rows:
        smooth = np.array([_smooth(np.array(curve), window) for curve in row.curves])
        steps = np.arange(window, window + smooth.shape[1])
        look = _look(comparison, row)
        axes.plot(steps, smooth.mean(axis=0), linewidth=1.6, **look)
        if len(smooth) > 1:
            axes.fill_between(
                steps, smooth.min(axis=0), smooth.max(axis=0), color=look["color"], alpha=0.12, lw=0
            )
        ends.append((float(steps[-1]), float(smooth.mean(axis=0)[-1]), row.label, look["color"]))
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(LogFormatter())  # plain numbers
    axes.yaxis.set_minor_formatter(LogFormatter())
    axes.set_xlabel("training step")
    axes.set_ylabel("training loss")
    smoothed = f", mean of the last {window} steps" if window > 1 else ""
    _title(axes, comparison, f"training loss at the chosen rates{smoothed}")
    label_ends(axes, ends)


def _smooth(losses: Any, window: int) -> Any:
    return np.convolve(losses, np.ones(window) / window, mode="valid")


def _percent(value: float | None) -> float:
    return 100 * (value or 0.0)


def _half(row: Row) -> float | None:
    return 50 * (row.interval[1] - row.interval[0]) if row.interval else None
