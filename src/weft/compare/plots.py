"""The pictures of a comparison: the score against what a method costs, its learning rates, and the
training curves.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .labels import label_ends, label_points
from .results import Comparison, Row

SCORES, STEP_TIME, MEMORY, RATES, CURVES = (
    "scores.png",
    "step-time.png",
    "memory.png",
    "learning-rates.png",
    "curves.png",
)
SIZE, DPI = (
    (6.4, 4.0),
    187.5,
)  # small, so that the letters can be read where the picture is as wide as a phone
# Okabe and Ito's colours, which colour-blind readers can tell apart; line styles take over where
# they run out.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", ":", "-.")
GREY = "#666666"
Paint = Callable[[Any, Comparison, Sequence[Row]], None]


def draw(found: Comparison, out: Path) -> list[str]:
    """Write the pictures into `out` and return their names; a picture has the rows that have what
    it shows, and one that would be empty is not written (nor kept from an earlier time).
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = []
    with mpl.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 10}):
        for name, paint, rows in _pictures(found):
            (out / name).unlink(missing_ok=True)
            if rows:
                figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
                FigureCanvasAgg(figure)  # not pyplot: nothing global, no display
                paint(figure.subplots(), found, rows)
                _save(figure, out / name)
                drawn.append(name)
    return drawn


def _pictures(found: Comparison) -> list[tuple[str, Paint, list[Row]]]:
    scored = [row for row in found.rows if row.complete]
    return [
        (SCORES, _scores, scored),
        (STEP_TIME, _step_time, [row for row in scored if "step_ratio" in row.cost]),
        (MEMORY, _memory, [row for row in scored if "peak_bytes" in row.cost]),
        (
            RATES,
            _rates,
            [row for row in found.rows if any(score is not None for score in row.tried.values())],
        ),
        (CURVES, _curves, [row for row in scored if row.curves]),
    ]


def _save(figure: Any, path: Path) -> None:
    """Whole or not at all, like every file of a comparison; no date, so that equal data give equal
    files.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png", metadata={"Software": None})
    temporary.replace(path)


def _look(found: Comparison, row: Row) -> dict[str, Any]:
    """The same colour and line for a row in all pictures."""
    place = [other.label for other in found.rows].index(row.label)
    return {
        "color": COLOURS[place % len(COLOURS)],
        "linestyle": STYLES[place // len(COLOURS) % len(STYLES)],
    }


def _scores(axes: Any, found: Comparison, rows: Sequence[Row]) -> None:
    """Rows that train nothing but the head have no place on a logarithmic axis: a line across."""
    for row in rows:
        if not row.trainable:
            axes.axhline(_percent(row.mean), color=GREY, linewidth=1, linestyle="--", zorder=1)
            axes.annotate(
                f"{row.label} (nothing but the head)",
                (1, _percent(row.mean)),
                (-2, 3),
                color=GREY,
                ha="right",
                fontsize=9,
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
            )
    points = [(row, float(row.trainable)) for row in rows if row.trainable]
    axes.set_xlabel("trainable parameters" + (", without the head" if found.head else ""))
    _against(axes, found, points, _parameter_axis)


def _step_time(axes: Any, found: Comparison, rows: Sequence[Row]) -> None:
    axes.set_xlabel("time of a training step, relative to the frozen-base limit")
    _against(axes, found, [(row, float(row.cost["step_ratio"])) for row in rows], _plain_axis)


def _memory(axes: Any, found: Comparison, rows: Sequence[Row]) -> None:
    axes.set_xlabel("most memory held at one time in a training step, MiB")
    _against(axes, found, [(row, row.cost["peak_bytes"] / 2**20) for row in rows], _plain_axis)


def _against(
    axes: Any, found: Comparison, points: Sequence[tuple[Row, float]], scale: Callable[[Any], None]
) -> None:
    """Mean test scores with their intervals over a cost of the method."""
    for row, x in points:
        axes.errorbar(
            x,
            _percent(row.mean),
            yerr=_half(row),
            fmt="o",
            capsize=4,
            markersize=6,
            color=_look(found, row)["color"],
            zorder=3,
        )
    if points:
        scale(axes)
    axes.set_ylabel(f"{found.metric} on the test split" + (", %" if found.scored_by.unit else ""))
    _title(
        axes,
        found,
        "mean"
        + (f" and 95 % t-interval over {found.seeds} seeds" if found.seeds > 1 else " of one seed"),
    )
    label_points(
        axes,
        [(x, _percent(row.mean), row.label, _look(found, row)["color"]) for row, x in points],
        [_half(row) or 0.0 for row, _ in points],
    )


def _title(axes: Any, found: Comparison, what: str) -> None:
    axes.set_title(textwrap.fill(f"{found.task} on {found.model}: {what}", 66), fontsize=10)
    axes.grid(alpha=0.25, which="major")


def _plain_axis(axes: Any) -> None:
    axes.margins(x=0.12)


def _parameter_axis(axes: Any) -> None:
    """Logarithmic, with 2k, 5k, 10k for 2,000 and so on; 2 and 5 are labelled where the range is
    short.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.margins(x=0.12)
    low, high = axes.get_xlim()
    short = high / low < 200
    label = FuncFormatter(lambda value, place: short_count(value))
    axes.xaxis.set_major_formatter(label)
    axes.xaxis.set_minor_locator(LogLocator(subs=(2, 5) if short else tuple(range(2, 10))))
    axes.xaxis.set_minor_formatter(label if short else NullFormatter())


def short_count(value: float) -> str:
    """10k for ten thousand, 5M, 7B."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _rates(axes: Any, found: Comparison, rows: Sequence[Row]) -> None:
    """Mean validation score of every rate tried; the chosen one is ringed, a failed one is a cross
    at the worst.
    """
    factor = found.chosen_by.factor
    held = [factor * score for row in rows for score in row.tried.values() if score is not None]
    worst = max(held) if found.chosen_by.lowest else min(held)
    for row in rows:
        look = _look(found, row)
        there = sorted((lr, factor * score) for lr, score in row.tried.items() if score is not None)
        axes.plot(
            *zip(*there, strict=True),
            marker="o",
            markersize=4,
            linewidth=1.4,
            label=row.label,
            **look,
        )
        chosen = [point for point in there if point[0] == row.lr]
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
    unit = " (lower is better)" if found.chosen_by.lowest else ", %" if found.chosen_by.unit else ""
    axes.set_ylabel(f"{found.chosen_by.metric} on validation{unit}")
    _title(
        axes, found, f"validation {'loss' if found.chosen_by.lowest else 'score'} by learning rate"
    )
    axes.figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)


def _curves(axes: Any, found: Comparison, rows: Sequence[Row]) -> None:
    """Mean over the seeds, smoothed; a band from the lowest seed to the highest."""
    from matplotlib.ticker import LogFormatter

    window = max(1, min(len(row.curves[0]) for row in rows) // 15)
    ends = []
    for row in rows:
        smooth = np.array([_smooth(np.array(curve), window) for curve in row.curves])
        steps = np.arange(window, window + smooth.shape[1])
        look = _look(found, row)
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
    _title(axes, found, f"training loss at the chosen rates{smoothed}")
    label_ends(axes, ends)


def _smooth(losses: Any, window: int) -> Any:
    return np.convolve(losses, np.ones(window) / window, mode="valid")


def _percent(value: float | None) -> float:
    return 100 * (value or 0.0)


def _half(row: Row) -> float | None:
    return 50 * (row.interval[1] - row.interval[0]) if row.interval else None
