"""Names in a picture: beside points and at the ends of lines, apart from each other and from what
they would hide.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

Label = tuple[float, float, str, str]  # x, y in data coordinates, text, colour


def label_points(axes: Any, labels: Sequence[Label], halves: Sequence[float]) -> None:
    """Each name beside its point, at the first place around it that is free of names, points and
    error bars.
    """
    axes.figure.draw_without_rendering()
    renderer = axes.figure.canvas.get_renderer()
    taken = [_bar_box(axes, x, y, half) for (x, y, _, _), half in zip(labels, halves, strict=True)]
    taken += [text.get_window_extent(renderer) for text in axes.texts]
    frame = axes.get_window_extent(renderer)
    for x, y, name, colour in labels:
        text = axes.annotate(
            textwrap.fill(name, 16),
            (x, y),
            (0, 0),
            textcoords="offset points",
            color=colour,
            fontsize=10,
            linespacing=1.05,
        )

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
    return Bbox(
        [
            [corners[0][0] - reach, corners[0][1] - reach],
            [corners[1][0] + reach, corners[1][1] + reach],
        ]
    )


def _places() -> list[tuple[float, float, str, str]]:
    """Offsets in points and alignments, nearest first."""
    places: list[tuple[float, float, str, str]] = []
    for far in (8, 16, 26, 38, 52, 68):
        places += [
            (far, 0, "left", "center"),
            (-far, 0, "right", "center"),
            (far, far, "left", "bottom"),
            (-far, far, "right", "bottom"),
            (far, -far, "left", "top"),
            (-far, -far, "right", "top"),
            (0, far, "center", "bottom"),
            (0, -far, "center", "top"),
        ]
    return places


def label_ends(axes: Any, labels: Sequence[Label]) -> None:
    """Names at the right of the curves, pushed apart where they would overlap, with a thin line to
    their curve.
    """
    axes.figure.draw_without_rendering()
    to_pixels = axes.transData.transform
    ordered = sorted(labels, key=lambda label: label[1])
    wanted = [float(to_pixels((x, y))[1]) for x, y, _, _ in ordered]
    height = 13 * axes.figure.dpi / 72
    low, high = axes.get_window_extent().y0, axes.get_window_extent().y1
    placed = spread(wanted, height, low + height / 2, high - height / 2)
    for (x, y, name, colour), want, at in zip(ordered, wanted, placed, strict=True):
        axes.annotate(
            name,
            (x, y),
            (18, (at - want) * 72 / axes.figure.dpi),
            textcoords="offset points",
            color=colour,
            va="center",
            fontsize=10,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.6,
                "shrinkA": 0,
                "shrinkB": 1,
                "relpos": (0, 0.5),
            },
        )


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Ascending places at least `gap` apart, near `wanted` (ascending) and, if they fit, within
    [low, high].
    """
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
