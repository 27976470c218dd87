"""Places names in a picture so that they hide neither each other nor the data."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

Label = tuple[float, float, str, str]  # x, y in data coordinates, text, colour


def label_points(axes: Any, labels: Sequence[Label], halves: Sequence[float]) -> None:
    """Puts each name near its point, at the first position that hides no name, point
    or error bar.
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

        def hidden(position: tuple[float, float, str, str], text: Any = text) -> float:
            """Pixels of the name that would overlap something or be outside the frame."""
            text.set(
                position=position[:2],
                horizontalalignment=position[2],
                verticalalignment=position[3],
            )
            box = text.get_window_extent(renderer).padded(1)
            outside = box.width * box.height - _overlap(box, frame)
            return float(outside + sum(_overlap(box, other) for other in taken))

        hidden(min(_positions(), key=hidden))  # the first of equally good ones
        taken.append(text.get_window_extent(renderer).padded(1))


def _overlap(a: Any, b: Any) -> float:
    """Area that two boxes share."""
    width, height = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
    return float(width * height) if width > 0 and height > 0 else 0.0


def _bar_box(axes: Any, x: float, y: float, half: float) -> Any:
    """Point, error bar and caps in pixels."""
    from matplotlib.transforms import Bbox

    corners = axes.transData.transform([(x, y - half), (x, y + half)])
    reach = 5 * axes.figure.dpi / 72
    return Bbox(
        [
            [corners[0][0] - reach, corners[0][1] - reach],
            [corners[1][0] + reach, corners[1][1] + reach],
        ]
    )


def _positions() -> list[tuple[float, float, str, str]]:
    """Offsets in points and alignments, nearest first."""
    positions: list[tuple[float, float, str, str]] = []
    for far in (8, 16, 26, 38, 52, 68):
        positions += [
            (far, 0, "left", "center"),
            (-far, 0, "right", "center"),
            (far, far, "left", "bottom"),
            (-far, far, "right", "bottom"),
            (far, -far, "left", "top"),
            (-far, -far, "right", "top"),
            (0, far, "center", "bottom"),
            (0, -far, "center", "top"),
        ]
    return positions


def label_ends(axes: Any, labels: Sequence[Label]) -> None:
    """Puts names at the right ends of the curves, moved apart if they overlap, with a thin line to
    the curve.
    """
    axes.figure.draw_without_rendering()
    to_pixels = axes.transData.transform
    ordered = sorted(labels, key=lambda label: label[1])
    wanted = [float(to_pixels((x, y))[1]) for x, y, _, _ in ordered]
    height = 13 * axes.figure.dpi / 72
    low, high = axes.get_window_extent().y0, axes.get_window_extent().y1
    positions = spread(wanted, height, low + height / 2, high - height / 2)
    for (x, y, name, colour), want, at in zip(ordered, wanted, positions, strict=True):
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
    """Returns ascending positions at least `gap` apart, near `wanted` (ascending).

    They are within [low, high] if they fit.
    """
    positions = list(wanted)
    for _ in range(200):
        for i in range(1, len(positions)):
            short = gap - (positions[i] - positions[i - 1])
            if short > 1e-6:
                positions[i - 1] -= short / 2
                positions[i] += short / 2
        if positions[0] < low:
            positions[0] = low
        if positions[-1] > high:
            positions[-1] = high
    for i in range(1, len(positions)):
        positions[i] = max(positions[i], positions[i - 1] + gap)
    return positions
