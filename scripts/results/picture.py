"""A comparison as a picture: one line per method with mean and interval. Plain SVG, so that equal
records give equal files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape

WIDTH, LINE, TOP, LEFT, RIGHT, BOTTOM = (
    500,
    25,
    44,
    92,
    90,
    40,
)  # narrow, so that the text is legible on a phone
FONT = 'font-family="system-ui, sans-serif"'


def picture(result: Mapping[str, Any], title: str) -> str:
    """Returns the SVG text. Rows are in the order of their trainable parameters, shown at the
    right; a bar is a 95 % t-interval.
    """
    rows = sorted(
        (row for row in result["rows"] if row["score_mean"] is not None),
        key=lambda row: (row["trainable"] or 0, row["method"]),
    )
    bounds = [
        100 * value for row in rows for value in (row["score_interval"] or [row["score_mean"]])
    ]
    low, high, ticks = axis(min(bounds), max(bounds))
    height = TOP + LINE * len(rows) + BOTTOM
    across = WIDTH - LEFT - RIGHT

    def x(value: float) -> float:
        return round(LEFT + across * (100 * value - low) / (high - low), 1)

    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 '
            f'0 {WIDTH} {height}" '
            f'role="img" {FONT} font-size="13">'
        ),
        f"<title>{escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
        _text(12, 18, title, weight=600),
        _text(WIDTH - 8, 36, "trainable", "end", "#555", 11),
    ]
    for tick in ticks:
        at = x(tick / 100)
        parts.append(
            f'<line x1="{at}" x2="{at}" y1="{TOP - 4}" y2="{height - BOTTOM + 4}" '
            'stroke="#e2e2e2"/>'
        )
        parts.append(_text(at, height - BOTTOM + 20, f"{tick:g}", "middle", "#555", 11))
    for place, row in enumerate(rows):
        parts += _line(row, TOP + LINE * (place + 0.5), x)
    below = f"{unit(result['metric'])} on the test examples"
    parts.append(_text(LEFT + across / 2, height - 6, below, "middle", "#555", 11))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _line(row: Mapping[str, Any], y: float, x: Any) -> list[str]:
    parts = [
        _text(LEFT - 10, y + 4, row["method"], "end"),
        _text(
            WIDTH - 8,
            y + 4,
            f"{row['trainable']:,}" if row["trainable"] else "head only",
            "end",
            "#555",
            11,
        ),
    ]
    if row["score_interval"]:
        low, high = row["score_interval"]
        parts.append(
            f'<line x1="{x(low)}" x2="{x(high)}" y1="{y}" y2="{y}" stroke="#0072B2" '
            'stroke-width="2"/>'
        )
        parts += [
            f'<line x1="{x(end)}" x2="{x(end)}" y1="{y - 4}" y2="{y + 4}" stroke="#0072B2" '
            'stroke-width="2"/>'
            for end in (low, high)
        ]
    return [*parts, f'<circle cx="{x(row["score_mean"])}" cy="{y}" r="4.5" fill="#0072B2"/>']


def _text(
    x: float,
    y: float,
    text: str,
    anchor: str = "start",
    colour: str = "#1b1b1b",
    size: int = 13,
    weight: int = 400,
) -> str:
    return (
        f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="{colour}" font-size="{size}" '
        f'font-weight="{weight}">'
        f"{escape(text)}</text>"
    )


def unit(metric: str) -> str:
    """Returns the unit of scores times 100: a percentage, or hundredths named by the metric."""
    return metric if metric.startswith(("BLEU", "ROUGE")) else f"{metric} %"


def axis(low: float, high: float) -> tuple[float, float, Sequence[float]]:
    """Returns round ends around [low, high] and round ticks between them."""
    span = max(high - low, 1.0)
    step = next(s for s in (0.5, 1, 2, 5, 10, 20) if span / s <= 8 or s == 20)
    first, last = math.floor(low / step) * step, math.ceil(high / step) * step
    return first, last, [first + step * i for i in range(round((last - first) / step) + 1)]
