"""Generates docs/results/ from the records. Equal records give equal files, byte for byte."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from weft.compare.plan.entries import format_rate
from weft.compare.report.paper_table import find_paper_table, task_kind
from weft.compare.report.verdict import p_value

from .experiments import EXPERIMENTS, Experiment
from .findings import ALPHA, MARGIN, NOT_SEEN, SEEN, UNKNOWN, findings, groups, unseen
from .picture import picture, unit
from .run import RECORDS
from .words import AGAIN, INDEX, PAGES, READING, TITLES, flowing

OUT = RECORDS.parent
EDGE = re.compile(
    r"(?P<method>.+): the best learning rate, (?P<rate>\S+), is at the edge of those tried "
    r"\((?P<tried>.+)\);"
)
MADE = "<!-- written by `make results` from docs/results/records -->"


def pages() -> dict[Path, str]:
    """Returns every page and picture with its text."""
    records = {
        e.name: json.loads(path.read_text(encoding="utf-8"))
        for e in EXPERIMENTS
        if (path := RECORDS / f"{e.name}.json").is_file()
    }
    out = {OUT / "index.md": _index(records)}
    for name in TITLES:
        out[OUT / f"{name}.md"] = _page(name, records)
    for experiment in EXPERIMENTS:
        if experiment.name in records:
            out[OUT / f"{experiment.name}.svg"] = picture(
                records[experiment.name]["result"], experiment.title
            )
    return out


def _index(records: Mapping[str, Any]) -> str:
    rows = []
    for experiment in EXPERIMENTS:
        where = f"[{experiment.title}]({experiment.page}.md#{_anchor(experiment.title)})"
        result = records[experiment.name]["result"] if experiment.name in records else None
        rows.append(
            [where, "-", "not run yet"]
            if result is None
            else [where, str(result["seeds"]), _best(result)]
        )
    table = _table(["comparison", "seeds", "not significantly worse than the best"], rows, "")
    reading = READING.format(alpha=ALPHA, margin=100 * MARGIN)
    blocks = [
        "# Results",
        MADE,
        flowing(INDEX),
        table,
        "## The papers' claims",
        _claims(records),
        "## How to read the tables",
        flowing(reading),
        "## How the pages are generated",
        flowing(AGAIN),
    ]
    return "\n\n".join(blocks) + "\n"


def _claims(records: Mapping[str, Any]) -> str:
    """Every claim with the comparisons in which it is seen, not seen or not decided."""
    places: dict[str, dict[str, list[str]]] = {}
    for experiment in EXPERIMENTS:
        if experiment.name in records:
            record = records[experiment.name]
            for one in findings(record["result"], experiment.claims, record["chance"]):
                places.setdefault(one.claim.says, {}).setdefault(one.verdict, []).append(
                    experiment.name
                )
    rows = [
        [", ".join(where.get(verdict, ["–"])) for verdict in (SEEN, NOT_SEEN, UNKNOWN)] + [says]
        for says, where in places.items()
    ]
    times = {
        name: sum(len(where.get(name, [])) for where in places.values())
        for name in (SEEN, NOT_SEEN, UNKNOWN)
    }
    summary = (
        f"Tested {sum(times.values())} times in total: {times[SEEN]} seen, {times[NOT_SEEN]} not "
        f"seen, {times[UNKNOWN]} "
        "not decided. Few seeds and few steps leave intervals wider than most differences that the "
        "papers print, so “cannot tell” is not a verdict on a method."
    )
    return f"{summary}\n\n{_table([SEEN, NOT_SEEN, UNKNOWN, 'claim'], rows, '')}"


def _best(result: Mapping[str, Any]) -> str:
    ranking = groups(result)
    if ranking is None:
        return "nothing was tested"
    best, same, worse = ranking
    if not worse:
        return f"all {len(same) + 1} rows"
    return ", ".join([best, *same])


def _page(name: str, records: Mapping[str, Any]) -> str:
    blocks = [f"# {TITLES[name]}", MADE, flowing(PAGES[name])]
    for experiment in EXPERIMENTS:
        if experiment.page == name:
            blocks += [f"## {experiment.title}", experiment.about]
            blocks += (
                _section(experiment, records[experiment.name])
                if experiment.name in records
                else ["Not run yet."]
            )
    return "\n\n".join(blocks) + "\n"


def _section(experiment: Experiment, record: Mapping[str, Any]) -> list[str]:
    result = record["result"]
    found = findings(result, experiment.claims, record["chance"])
    claims = [[one.verdict, *_gap(one), one.claim.says] for one in found]
    shown = f"![{experiment.title}: score of every method]({experiment.name}.svg)"
    blocks = [
        _pretrained(record),
        _ranking_text(result),
        shown,
        _scores(result, record["chance"]),
        _metrics(result),
        _notes(result),
        "### What the papers claim",
        _table(["verdict", "points", "95 % interval", "claim"], claims, "lrrl"),
        unseen(found),
        _printed(experiment),
        "### How this was made",
        *_made(record),
    ]
    return [block for block in blocks if block]


def _pretrained(record: Mapping[str, Any]) -> str:
    about = record["prepared"]
    if not about:
        return ""
    return (
        f"The pretrained model: {about['parameters']:,} parameters, {about['steps']:,} steps of "
        f"{about['batch']} on "
        f"{about['images']:,} images of the first five classes in {about['seconds'] / 60:.0f} "
        f"minutes on one busy core; {about['held_out_accuracy']:.1%} right on "
        f"{about['held_out']:,} other images of these "
        "classes."
    )


def _ranking_text(result: Mapping[str, Any]) -> str:
    """Which rows are worse than the best, by which test."""
    ranking = groups(result)
    if ranking is None:
        return f"No ranking: {result['no_recommendation']}"
    rows = [row for row in result["rows"] if row["worse_p"] is not None]
    seeds = [row["method"] for row in rows if row["worse_p"] < ALPHA]
    examples = [row["method"] for row in rows if (row.get("worse_p_examples") or 1.0) < ALPHA]
    why_not = result.get("no_recommendation")
    summary = [
        *([f"No recommendation: {why_not}"] if why_not else []),
        f"{ranking[0]} has the highest mean.",
        f"Significantly worse over the {result['seeds']} seeds: {_names(seeds, rows)}.",
    ]
    if any(row.get("worse_p_examples") is not None for row in rows):
        summary.append(f"Over the test examples, for these runs only: {_names(examples, rows)}.")
    return " ".join([*summary, "Beyond that, the order of the means says nothing."])


def _names(named: Sequence[str], rows: Sequence[Any]) -> str:
    if not named:
        return "no row"
    return "every other row" if len(named) == len(rows) else ", ".join(named)


def _scores(result: Mapping[str, Any], chance: float | None) -> str:
    rows = [
        [
            row["method"],
            _count(row["trainable"]),
            _score(row),
            _tests(row),
            _behind(row["example_gap"]),
            _number(row["lr"], format_rate),
        ]
        for row in result["rows"]
    ]
    head = [
        "method",
        "trainable",
        unit(result["metric"]),
        "p, seeds / examples",
        "points behind",
        "learning rate",
    ]
    extra = (
        f" The head adds {result['head_trainable']:,} to every row."
        if result.get("head_trainable")
        else ""
    )
    extra += f" Always the most frequent class: {100 * chance:.1f} %." if chance is not None else ""
    behind = (
        " Points behind: distance to the best row, over the test examples (paired bootstrap, 95 %)."
        if any(row["example_gap"] for row in result["rows"])
        else ""
    )
    return f"{_table(head, rows, 'lrrrrr')}\n\nTrainable: without the head.{extra}{behind}"


def _printed(experiment: Experiment) -> str:
    """The scores that the paper prints for this task."""
    if experiment.like is None:
        return ""
    table = find_paper_table(experiment.like, experiment.task)
    column = table.columns[task_kind(experiment.task)]
    rows = "; ".join(
        f"{row['row']} {row['scores'][column][0]:.1f}" for row in table.rows_with(column)
    )
    return (
        f"Printed in the {table.title} ({column}): {rows}. Model, data, steps and protocol "
        f"differ there; `weft compare --like {table.name}` shows the rows of a comparison under "
        "these and lists the differences."
    )


def _metrics(result: Mapping[str, Any]) -> str:
    """All metrics of a task with several, as the task's own tool prints them."""
    names = list(dict.fromkeys(name for row in result["rows"] for name in row.get("metrics") or {}))
    if len(names) < 2:
        return ""
    rows = [
        [row["method"], *(_mean((row.get("metrics") or {}).get(name, [])) for name in names)]
        for row in result["rows"]
    ]
    table = _table(["method", *names], rows, "l" + "r" * len(names))
    return f"{table}\n\nMeans over the seeds, as each metric's own tool prints it."


def _mean(scores: Sequence[float | None]) -> str:
    there = [score for score in scores if score is not None]
    return f"{sum(there) / len(there):.4f}" if there and len(there) == len(scores) else "–"


def _number(value: float | None, shown: Callable[[float], str]) -> str:
    return "–" if value is None else shown(value)


def _tests(row: Mapping[str, Any]) -> str:
    """The p-values of both tests that the row is worse than the best."""
    both = [_number(row.get(key), p_value) for key in ("worse_p", "worse_p_examples")]
    return "–" if set(both) == {"–"} else " / ".join(both)


def _behind(gap: Mapping[str, Any] | None) -> str:
    if gap is None:
        return "–"
    low, high = gap["interval"]
    return f"{100 * gap['mean']:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def _count(number: int | None) -> str:
    return "–" if number is None else f"{number:,}"


def _score(row: Mapping[str, Any]) -> str:
    if row["score_mean"] is None:
        return f"failed: {row['reason']}" if row["reason"] else "–"
    low, high = row["score_interval"] or (row["score_mean"], row["score_mean"])
    return f"{100 * row['score_mean']:.1f} ± {50 * (high - low):.1f}"


def _gap(one: Any) -> list[str]:
    if one.mean is None:
        return ["–", "–"]
    low, high = one.interval or (one.mean, one.mean)
    return [f"{100 * one.mean:+.1f}", f"{100 * low:+.1f} to {100 * high:+.1f}"]


def _notes(result: Mapping[str, Any]) -> str:
    """The comparison's notes. Rates at the edge of their grid are collected in one line."""
    edges = [found for note in result["notes"] if (found := EDGE.match(note))]
    lines = [note for note in result["notes"] if not EDGE.match(note)]
    if edges:
        rates = "; ".join(
            f"{found['method']} {found['rate']} (of {found['tried']})" for found in edges
        )
        lines.append(
            f"Best at an edge of the rates tried, so a better one may be beyond it: {rates}."
        )
    return "\n".join(
        f"- {note.replace('|', chr(92) + '|').replace('_', chr(92) + '_')}" for note in lines
    )


def _made(record: Mapping[str, Any]) -> list[str]:
    machine, versions = record["machine"], record["versions"]
    told = ", ".join(
        f"{name} {versions[name]}" for name in ("weft", "torch", "transformers", "python")
    )
    sizes = ", ".join(f"{count:,} {name}" for name, count in record["result"]["examples"].items())
    return [
        f"```console\n$ {record['command']}\n```",
        (
            f"{record['date']}, {machine['cpu']}, {machine['cores']} cores, {told}, commit "
            f"{versions['commit']}; "
            f"the machine had other work, so times are omitted. Examples: {sizes}. DATA, WORK "
            "and OUT are folders."
        ),
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], sides: str) -> str:
    """A Markdown table. `sides` has l or r per column; if it is empty, all columns are
    left-aligned.
    """
    rules = ["---:" if side == "r" else "---" for side in sides or "l" * len(head)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rules, *rows))


def _anchor(title: str) -> str:
    return "-".join("".join(c for c in title.lower() if c.isalnum() or c in " -").split())
