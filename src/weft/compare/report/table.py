"""A comparison as text for the terminal, at most 80 columns wide."""

from __future__ import annotations

import textwrap

from ...untrusted.printable import WIDTH
from ..plan.entries import format_rate
from .comparison import Comparison, Row
from .verdict import verdict_of

GAP = "  "
HEADER = ("method", "trainable", "bytes", "{score}", "lr", "step", "peak", "steps")


def table_text(comparison: Comparison) -> str:
    """Returns everything that is printed at the end."""
    parts = [title(comparison), scores_table(comparison), "\n".join(legend(comparison))]
    parts += [
        wrap(f"{row.label} failed: {flat(row.reason)}.") for row in comparison.rows if row.reason
    ]
    parts += (
        ["\n".join(wrap(f"- {note}", indent="  ") for note in comparison.notes)]
        if comparison.notes
        else []
    )
    return "\n\n".join([*parts, verdict_text(comparison)])


def scores_table(comparison: Comparison) -> str:
    """Returns one line per method; a long name continues on further lines of its column."""
    columns = len(HEADER) - (
        comparison.settings["steps"] is not None
    )  # reason in the title where all rows have the same
    cells = [
        tuple(name.format(score=comparison.scored_by.label) for name in HEADER)[:columns],
        *(cells_of(row)[:columns] for row in comparison.rows),
    ]
    widths = [max(len(line[i]) for line in cells) for i in range(1, columns)]
    room = WIDTH - sum(widths) - len(GAP) * len(widths)
    names = [textwrap.wrap(line[0], room, subsequent_indent=" ") for line in cells]
    first = max(len(piece) for pieces in names for piece in pieces)
    lines = []
    for pieces, line in zip(names, cells, strict=True):
        rest = [cell.rjust(width) for cell, width in zip(line[1:], widths, strict=True)]
        lines += [GAP.join([pieces[0].ljust(first), *rest]), *pieces[1:]]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def verdict_text(comparison: Comparison) -> str:
    """Returns the recommendation and its reason, or the reason why there is none."""
    verdict = verdict_of(comparison)
    if verdict.recommended is None:
        return wrap(f"{verdict.headline}: {verdict.why}")
    return f"{wrap(verdict.headline)}\n{wrap(verdict.why)}"


def title(comparison: Comparison) -> str:
    """Returns task, model, data, seeds, budget and device."""
    sizes = ", ".join(f"{count:,} {name}" for name, count in comparison.sizes.items())
    return wrap(
        f"{comparison.task} on {comparison.model}: {_task_kind(comparison)}, {sizes} examples; "
        f"{comparison.seeds} seed{'s' * (comparison.seeds != 1)}; {comparison.budget}; {comparison.device}"
    )


def _task_kind(comparison: Comparison) -> str:
    if comparison.kind == "generation":
        return "generated answers"
    return f"{len(comparison.classes)} classes" if comparison.classes else "a regression"


def cells_of(row: Row) -> tuple[str, ...]:
    """Returns the cells of one row, in the order of HEADER."""
    ratio, peak = row.cost.get("step_ratio"), row.cost.get("peak_bytes")
    return (
        row.label,
        count(row.trainable),
        size(row.nbytes),
        score_text(row),
        format_rate(row.lr) if row.lr else "-",
        f"{ratio:.2f}" if ratio is not None else "-",
        size(peak),
        count(row.steps),
    )


def score_text(row: Row) -> str:
    """Returns the mean score and half of its interval."""
    if row.mean is None:
        return "failed" if row.reason else "-"
    mark = " !" if row.reason else ""
    if row.interval is None:
        return f"{100 * row.mean:.1f}{mark}"
    return f"{100 * row.mean:.1f} ±{50 * (row.interval[1] - row.interval[0]):>4.1f}{mark}"


def count(number: int | None) -> str:
    """Returns a number with separators; it is rounded from one billion on."""
    if number is None:
        return "-"
    return f"{number:,}" if number < 10**9 else f"{number / 10**9:.4g} B"


def size(number: float | None) -> str:
    """Returns a number of bytes in at most nine characters."""
    if number is None:
        return "-"
    unit = "B"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1000 or unit == "GiB":
            break
        number /= 1024
    return f"{number:.0f} {unit}" if unit == "B" or number >= 100 else f"{number:.3g} {unit}"


def legend(comparison: Comparison) -> list[str]:
    """Returns the legend of the columns."""
    head = (
        f", which adds {comparison.head_trainable:,} to every row (bytes include it)"
        if comparison.head_trainable
        else ""
    )
    many = f"± half of the 95 % t-interval over {comparison.seeds} seeds"
    spread = many if comparison.seeds > 1 else "of one seed, without an interval"
    return [
        f"trainable: without the head{head}"
        if comparison.head
        else "trainable: all trained parameters",
        f"{comparison.metric + ':':<10} test split; mean {spread}",
        "lr:        peak learning rate, chosen "
        + ("by the lowest loss " if comparison.chosen_by.lowest else "")
        + "on the validation split",
        "step:      time of a training step relative to the frozen-base limit",
        "peak:      peak memory of a training step",
    ]


def flat(reason: str | None) -> str:
    """Returns a reason on one line, without a full stop."""
    return " ".join((reason or "").split()).rstrip(".")


def wrap(line: str, indent: str = "") -> str:
    """Wraps to the width of the terminal. Longer words, such as paths, are split."""
    return "\n".join(textwrap.wrap(line, WIDTH, subsequent_indent=indent, break_on_hyphens=False))
