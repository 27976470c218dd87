"""Two pictures of a comparison: score against trainable parameters, and the training curves."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .results import Comparison, Row

SCORES, CURVES = "scores.png", "curves.png"
SIZE, DPI = (8.0, 5.0), 150
# Okabe and Ito's colours, which colour-blind readers can tell apart; line styles take over where they run out.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", ":", "-.")
GREY = "#666666"


def draw(found: Comparison, out: Path) -> list[str]:
    """Write both pictures into `out` and return their names; rows without a score are not in them."""
    rows = [row for row in found.rows if row.complete]
    if not rows:
        return []
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 10}):
        for name, paint in ((SCORES, _scores), (CURVES, _curves)):
            figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
            FigureCanvasAgg(figure)  # not pyplot: nothing global, no display
            paint(figure.subplots(), found, rows)
            _save(figure, out / name)
    return [SCORES, CURVES]


def _save(figure: Any, path: Path) -> None:
    """Whole or not at all, like every file of a comparison; no date, so that equal data give equal files."""
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png", metadata={"Software": None})
    temporary.replace(path)


def _look(found: Comparison, row: Row) -> dict[str, Any]:
    """The same colour and line for a row in both pictures."""
    place = [other.label for other in found.rows].index(row.label)
    return {"color": COLOURS[place % len(COLOURS)], "linestyle": STYLES[place // len(COLOURS) % len(STYLES)]}


def _scores(axes: Any, found: Comparison, rows: Sequence[Row]) -> None:
    """Rows that train nothing but the head have no place on a logarithmic axis: a line across."""
    points = [row for row in rows if row.trainable]
    for row in points:
        axes.errorbar(row.trainable, _percent(row.mean), yerr=_half(row), fmt="o", capsize=4, markersize=6,
                      color=_look(found, row)["color"], zorder=3)
    for row in rows:
        if not row.trainable:
            axes.axhline(_percent(row.mean), color=GREY, linewidth=1, linestyle="--", zorder=1)
            axes.annotate(f"{row.label} (nothing but the head)", (1, _percent(row.mean)), (-2, 3), color=GREY,
                          ha="right", fontsize=9, xycoords=("axes fraction", "data"), textcoords="offset points")
    if points:
        _parameter_axis(axes)
    axes.set_xlabel("trainable parameters, without the head")
    axes.set_ylabel(f"{found.metric} on the test split, %")
    axes.set_title(f"{found.task} on {found.model}: mean" + (f" and 95 % t-interval over {found.seeds} seeds"
                                                          if found.seeds > 1 else " of one seed"), fontsize=11)
    axes.grid(alpha=0.25, which="major")
    _label_points(axes, [(float(row.trainable or 1), _percent(row.mean), row.label, _look(found, row)["color"])
                         for row in points], [_half(row) or 0.0 for row in points])


def _parameter_axis(axes: Any) -> None:
    """Logarithmic, with 2k, 5k, 10k for 2,000 and so on; 2 and 5 are labelled where the range is short."""
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


def _curves(axes: Any, found: Comparison, rows: Sequence[Row]) -> None:
    """Mean over the seeds, smoothed; a band from the lowest seed to the highest."""
    window = max(1, len(rows[0].curves[0]) // 15)
    ends = []
    for row in rows:
        smooth = np.array([_smooth(np.array(curve), window) for curve in row.curves])
        steps = np.arange(window, window + smooth.shape[1])
        look = _look(found, row)
        axes.plot(steps, smooth.mean(axis=0), linewidth=1.6, **look)
        if len(smooth) > 1:
            axes.fill_between(steps, smooth.min(axis=0), smooth.max(axis=0), color=look["color"], alpha=0.12, lw=0)
        ends.append((float(steps[-1]), float(smooth.mean(axis=0)[-1]), row.label, look["color"]))
    axes.set_yscale("log")
    axes.set_xlabel("training step")
    axes.set_ylabel("training loss")
    smoothed = f", mean of the last {window} steps" if window > 1 else ""
    axes.set_title(f"{found.task} on {found.model}: training loss at the chosen rates{smoothed}", fontsize=11)
    axes.grid(alpha=0.25, which="major")
    _label_ends(axes, ends)


def _smooth(losses: Any, window: int) -> Any:
    return np.convolve(losses, np.ones(window) / window, mode="valid")


def _percent(value: float | None) -> float:
    return 100 * (value or 0.0)


def _half(row: Row) -> float | None:
    return 50 * (row.interval[1] - row.interval[0]) if row.interval else None


Label = tuple[float, float, str, str]  # x, y in data coordinates, text, colour


def _label_points(axes: Any, labels: Sequence[Label], halves: Sequence[float]) -> None:
    """Each name beside its point, at the first place around it that is free of names, points and error bars."""
    axes.figure.draw_without_rendering()
    renderer = axes.figure.canvas.get_renderer()
    taken = [_bar_box(axes, x, y, half) for (x, y, _, _), half in zip(labels, halves, strict=True)]
    taken += [text.get_window_extent(renderer) for text in axes.texts]
    frame = axes.get_window_extent(renderer)
    for x, y, name, colour in labels:
        text = axes.annotate(textwrap.fill(name, 16), (x, y), (0, 0), textcoords="offset points", color=colour,
                             fontsize=10, linespacing=1.05)

        def hidden(place: tuple[float, float, str, str], text: Any = text) -> float:
            """Pixels of the name that would lie on something else or outside."""
            text.set(position=place[:2], horizontalalignment=place[2], verticalalignment=place[3])
            box = text.get_window_extent(renderer).padded(1)
            outside = box.width * box.height - _shared(box, frame)
            return float(outside + sum(_shared(box, other) for other in taken))

        hidden(min(_places(), key=hidden))  # the first of the best
        taken.append(text.get_window_extent(renderer).padded(1))


def _shared(a: Any, b: Any) -> float:
    """Area that two boxes share."""
    width, height = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
    return float(width * height) if width > 0 and height > 0 else 0.0


def _bar_box(axes: Any, x: float, y: float, half: float) -> Any:
    """Point, bar and caps in pixels."""
    from matplotlib.transforms import Bbox

    corners = axes.transData.transform([(x, y - half), (x, y + half)])
    reach = 5 * axes.figure.dpi / 72
    return Bbox([[corners[0][0] - reach, corners[0][1] - reach], [corners[1][0] + reach, corners[1][1] + reach]])


def _places() -> list[tuple[float, float, str, str]]:
    """Offsets in points and alignments, nearest first."""
    places: list[tuple[float, float, str, str]] = []
    for far in (8, 16, 26, 38, 52, 68):
        places += [(far, 0, "left", "center"), (-far, 0, "right", "center"), (far, far, "left", "bottom"),
                   (-far, far, "right", "bottom"), (far, -far, "left", "top"), (-far, -far, "right", "top"),
                   (0, far, "center", "bottom"), (0, -far, "center", "top")]
    return places


def _label_ends(axes: Any, labels: Sequence[Label]) -> None:
    """Names at the right of the curves, pushed apart where they would overlap, with a thin line to their curve."""
    axes.figure.draw_without_rendering()
    to_pixels = axes.transData.transform
    ordered = sorted(labels, key=lambda label: label[1])
    wanted = [float(to_pixels((x, y))[1]) for x, y, _, _ in ordered]
    height = 13 * axes.figure.dpi / 72
    low, high = axes.get_window_extent().y0, axes.get_window_extent().y1
    placed = spread(wanted, height, low + height / 2, high - height / 2)
    for (x, y, name, colour), want, at in zip(ordered, wanted, placed, strict=True):
        axes.annotate(name, (x, y), (18, (at - want) * 72 / axes.figure.dpi), textcoords="offset points", color=colour,
                      va="center", fontsize=10, annotation_clip=False,
                      arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 1,
                                  "relpos": (0, 0.5)})


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Ascending places at least `gap` apart, near `wanted` (ascending) and, if they fit, within [low, high]."""
    places = list(wanted)
    for _ in range(200):
        for i in range(1, len(places)):
            short = gap - (places[i] - places[i - 1])
            if short > 1e-6:
                places[i - 1] -= short / 2
                places[i] += short / 2
        if places[0] < low:
            places[0] = low
        if places[-1] > high:
            places[-1] = high
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + gap)
    return places
