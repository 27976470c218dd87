"""A comparison for people (a table of at most 80 columns) and for machines (JSON, CSV)."""

from __future__ import annotations

import csv
import io
import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from typing import Any

from .. import __version__
from .entries import rate
from .examples import Gap
from .results import Comparison, Row, Run
from .statistics import ALPHA, MIN_SEEDS, Ranking, gap_bound, seeds_needed
from .store import SCHEMA

WIDTH = 80
GAP = "  "
HEADER = ("method", "trainable", "bytes", "{score}", "lr", "step", "peak", "steps")


def text(found: Comparison) -> str:
    """Everything that is printed at the end."""
    parts = [title(found), table(found), "\n".join(legend(found))]
    parts += [wrap(f"{row.label} failed: {flat(row.reason)}.") for row in found.rows if row.reason]
    parts += (
        ["\n".join(wrap(f"- {note}", indent="  ") for note in found.notes)] if found.notes else []
    )
    return "\n\n".join([*parts, verdict(found)])


def table(found: Comparison) -> str:
    """One line a method; a long name goes on in further lines of its column."""
    columns = len(HEADER) - (
        found.settings["steps"] is not None
    )  # said in the title where all rows have the same
    cells = [
        tuple(name.format(score=found.scored_by.label) for name in HEADER)[:columns],
        *(cells_of(row)[:columns] for row in found.rows),
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


def verdict(found: Comparison) -> str:
    """The recommendation in one line and why in the next; or why there is none."""
    ranking = found.ranking()
    if ranking is None:
        return wrap(f"No ranking: {no_ranking(found)}")
    return f"{wrap(headline(ranking))}\n{wrap(why(found, ranking))}"


def to_json(found: Comparison) -> dict[str, Any]:
    """The contract's schema 1, and more fields beside it."""
    ranking = found.ranking()
    recommendation = (
        {"method": ranking.recommended, "why": why(found, ranking)} if ranking else None
    )
    return {
        "schema": SCHEMA,
        "task": found.task,
        "model": found.model,
        "metric": found.metric,
        "weft": __version__,
        "kind": found.kind,
        "validation": {"metric": found.chosen_by.metric, "lowest_is_best": found.chosen_by.lowest},
        "seeds": found.seeds,
        "settings": dict(found.settings),
        "examples": dict(found.sizes),
        "classes": list(found.classes),
        "head": list(found.head),
        "head_trainable": found.head_trainable,
        "rows": [_row_json(row, ranking, found.gaps.get(row.label)) for row in found.rows],
        "recommendation": recommendation,
        "no_recommendation": None if ranking else no_ranking(found),
        "ranking": _ranking_json(found, ranking) if ranking else None,
        "device": found.device,
        "versions": dict(found.versions),
        "notes": list(found.notes),
    }


def to_csv(found: Comparison) -> str:
    """One line a row; numbers as in the JSON, an empty field where there is none."""
    columns = [
        "method",
        "trainable",
        "head_trainable",
        "bytes",
        "score_mean",
        "score_low",
        "score_high",
        *(f"score_seed_{seed}" for seed in range(found.seeds)),
        "lr",
        "step_ratio",
        "peak_bytes",
        "status",
        "reason",
        "steps",
        "budget",
    ]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    for row in found.rows:
        low, high = row.interval or (None, None)
        writer.writerow(
            [
                row.label,
                row.trainable,
                row.head_trainable,
                row.nbytes,
                row.mean,
                low,
                high,
                *row.scores,
                row.lr,
                row.cost.get("step_ratio"),
                row.cost.get("peak_bytes"),
                row.status,
                row.reason,
                row.steps,
                found.settings["budget"],
            ]
        )
    return out.getvalue()


def runs_csv(found: Comparison) -> str:
    """One line a training run."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    plain = [field.name for field in fields(Run) if field.name != "scores"]
    writer.writerow(["method", *plain, "status", *(f"test_{name}" for name in found.metrics)])
    for row in found.rows:
        runs = [replace(run, earlier="; ".join(run.earlier)) for run in row.runs]
        writer.writerows(
            [
                row.label,
                *(getattr(run, name) for name in plain),
                run.status,
                *(run.scores.get(name) for name in found.metrics),
            ]
            for run in runs
        )
    return out.getvalue()


def dumps(found: Comparison) -> str:
    return json.dumps(to_json(found), indent=1, ensure_ascii=False) + "\n"


def _ranking_json(found: Comparison, ranking: Ranking) -> dict[str, Any]:
    return {
        "best": ranking.best,
        "worse_p": dict(ranking.p),
        "worse_p_examples": dict(ranking.on_examples),
        "test": _test(found, ranking),
    }


def _row_json(row: Row, ranking: Ranking | None, gap: Gap | None) -> dict[str, Any]:
    return {
        "method": row.label,
        "config": dict(row.config),
        "trainable": row.trainable,
        "head_trainable": row.head_trainable,
        "bytes": row.nbytes,
        "score_mean": row.mean,
        "steps": row.steps,
        "score_interval": list(row.interval) if row.interval else None,
        "scores": list(row.scores),
        "step_ratio": row.cost.get("step_ratio"),
        "step_ratio_spread": row.cost.get("step_ratio_spread"),
        "step_seconds": row.cost.get("step_seconds"),
        "limit_seconds": row.cost.get("limit_seconds"),
        "peak_bytes": row.cost.get("peak_bytes"),
        "lr": row.lr,
        "lr_validation": {rate(lr): score for lr, score in row.tried.items()},
        "worse_p": ranking.p.get(row.label) if ranking else None,
        "worse_p_examples": ranking.on_examples.get(row.label) if ranking else None,
        "example_gap": {"mean": gap.mean, "interval": list(gap.interval), "examples": gap.examples}
        if gap
        else None,
        "metrics": row.metrics,
        "adapter": row.adapter,
        "status": row.status,
        "reason": row.reason,
        "runs": [{**asdict(run), "status": run.status} for run in row.runs],
    }


def title(found: Comparison) -> str:
    sizes = ", ".join(f"{count:,} {name}" for name, count in found.sizes.items())
    return wrap(
        f"{found.task} on {found.model}: {_kind(found)}, {sizes} examples; "
        f"{found.seeds} seed{'s' * (found.seeds != 1)}; {found.budget}; {found.device}"
    )


def _kind(found: Comparison) -> str:
    if found.kind == "generation":
        return "generated answers"
    return f"{len(found.classes)} classes" if found.classes else "a regression"


def cells_of(row: Row) -> tuple[str, ...]:
    ratio, peak = row.cost.get("step_ratio"), row.cost.get("peak_bytes")
    return (
        row.label,
        count(row.trainable),
        size(row.nbytes),
        score(row),
        rate(row.lr) if row.lr else "-",
        f"{ratio:.2f}" if ratio is not None else "-",
        size(peak),
        count(row.steps),
    )


def score(row: Row) -> str:
    if row.mean is None:
        return "failed" if row.reason else "-"
    mark = " !" if row.reason else ""
    if row.interval is None:
        return f"{100 * row.mean:.1f}{mark}"
    return f"{100 * row.mean:.1f} ±{50 * (row.interval[1] - row.interval[0]):>4.1f}{mark}"


def count(number: int | None) -> str:
    """Exact up to a billion."""
    if number is None:
        return "-"
    return f"{number:,}" if number < 10**9 else f"{number / 10**9:.4g} B"


def size(number: float | None) -> str:
    """Bytes in at most nine characters."""
    if number is None:
        return "-"
    unit = "B"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1000 or unit == "GiB":
            break
        number /= 1024
    return f"{number:.0f} {unit}" if unit == "B" or number >= 100 else f"{number:.3g} {unit}"


def legend(found: Comparison) -> list[str]:
    head = (
        f", which adds {found.head_trainable:,} to every row (bytes include it)"
        if found.head_trainable
        else ""
    )
    many = f"± half of the 95 % t-interval over {found.seeds} seeds"
    spread = many if found.seeds > 1 else "of one seed, without an interval"
    return [
        f"trainable: without the head{head}"
        if found.head
        else "trainable: all numbers that are trained",
        f"{found.metric + ':':<10} test split; mean {spread}",
        "lr:        peak learning rate, chosen "
        + ("by the lowest loss " if found.chosen_by.lowest else "")
        + "on the validation split",
        "step:      time of a training step relative to the frozen-base limit",
        "peak:      most memory held at one time in a training step",
    ]


def no_ranking(found: Comparison) -> str:
    if found.seeds < MIN_SEEDS:
        return (
            f"with {found.seeds} seed{'s' * (found.seeds != 1)} a difference between methods "
            "cannot be told from "
            f"chance. Use --seeds {MIN_SEEDS} --resume."
        )
    scored = sum(row.complete is not None for row in found.rows)
    if len(found.rows) > scored:
        return f"only {scored} of {len(found.rows)} rows {'has' if scored == 1 else 'have'} all scores."
    return "there is one row, and nothing to compare it with."


def headline(ranking: Ranking) -> str:
    """At most 80 characters for the names that methods have by themselves."""
    name = ranking.recommended
    if name == ranking.best:
        return f"Recommended: {name}, the best; none smaller comes up to it (paired t-test, Holm)"
    return f"Recommended: {name}, not significantly worse than {ranking.best} (paired t, Holm, p {p_value(ranking.p[name])})"


def _test(found: Comparison, ranking: Ranking) -> str:
    over = (
        f" and, apart, over the {len(found.row(ranking.best).right[0]):,} test examples"
        if ranking.on_examples
        else ""
    )
    return (
        f"one-sided paired t-test over {found.seeds} seeds{over}, against {ranking.best}, "
        "Holm-corrected over "
        f"{len(ranking.p)} row{'s' * (len(ranking.p) != 1)}, alpha {ALPHA}"
    )


def why(found: Comparison, ranking: Ranking) -> str:
    best, chosen = found.row(ranking.best), found.row(ranking.recommended)
    test = _test(found, ranking)
    if chosen is best:
        return f"{best.label} has the highest mean, and every smaller row is significantly worse ({test})."
    a, b, name = best.complete or [], chosen.complete or [], chosen.label
    on_examples = (
        f" and {p_value(ranking.on_examples[name])}" if name in ranking.on_examples else ""
    )
    said = (
        f"{name} is the smallest row that is not significantly worse than the best, {best.label} "
        f"({test}; "
        f"p = {p_value(ranking.p[name])}{on_examples}). It may still be worse: its mean is "
        f"{100 * (sum(a) - sum(b)) / len(a):.1f} points lower, and at 95 % confidence the gap is "
        "below "
        f"{100 * gap_bound(a, b):.1f}."
    )
    return f"{said}{_on_examples(found.gaps.get(name))}{_advice(a, b, len(ranking.p), found.seeds)}"


def _on_examples(gap: Gap | None) -> str:
    """What the test examples say, which is another question than what the seeds say."""
    if gap is None:
        return ""
    low, high = (100 * bound for bound in gap.interval)
    return (
        f" With the same runs, on other examples like these {gap.examples:,}, it would be between "
        f"{low:.1f} and "
        f"{high:.1f} points lower (paired bootstrap over the examples, 95 %)."
    )


def _advice(best: Sequence[float], chosen: Sequence[float], tests: int, seeds: int) -> str:
    needed = seeds_needed(best, chosen, tests)
    if needed is None or needed <= seeds:
        return ""
    if needed > 100:
        return " More than 100 seeds would be needed to see a gap of one point."
    return f" To see a gap of one point, use about {needed} seeds: --seeds {needed} --resume."


def p_value(value: float) -> str:
    return f"{value:.2g}" if value >= 0.001 else "<0.001"


def flat(reason: str | None) -> str:
    return " ".join((reason or "").split()).rstrip(".")


def wrap(line: str, indent: str = "") -> str:
    """Long words (paths) are cut rather than wider than the terminal."""
    return "\n".join(textwrap.wrap(line, WIDTH, subsequent_indent=indent, break_on_hyphens=False))
