"""Results on paper: the table in 80 columns, the details of each case, and the short form for the
README.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from .case import METRICS

WIDTH = 80
BYTES = {"saved", "held", "peak", "beyond", "process_peak", "bytes"}
PLAIN = {"tokens_1", "tokens_8", "passed", "failed"}  # printed as they are
DIFFERENCES = {"beyond", "forward_extra", "train_extra"}  # that have no ratio to the first's


def table(data: Mapping[str, Any]) -> str:
    """Everything: the summary, and the contenders of each case."""
    return _wrapped("\n\n".join([summary(data), *(details(case) for case in data["cases"])]))


def summary(data: Mapping[str, Any]) -> str:
    """Where it ran, the rows with targets, and what else was measured."""
    rows = [row for case in data["cases"] for row in case["rows"]]
    parts = [where(data), _rows([r for r in rows if r["main"]])]
    others = [r for r in rows if not r["main"]]
    if others:
        parts.append("also measured\n" + _rows(others))
    return _wrapped("\n\n".join(parts))


def _wrapped(text: str) -> str:
    lines = text.splitlines()
    return "\n".join(
        part
        for line in lines
        for part in (textwrap.wrap(line, WIDTH, subsequent_indent="  ") or [""])
    )


def where(data: Mapping[str, Any]) -> str:
    """Command, date, machine and versions."""
    m, v = data["machine"], data["versions"]
    lines = [
        f"{data['command']}, {data['date']}",
        f"{m['cpu']}, {m['cores']} cores, {m['threads']} threads, {m['ram'] / 2**30:.1f} GiB",
        (
            f"Python {v['python']}, torch {v['torch']}, transformers {v['transformers']}, peft "
            f"{v['peft']}"
        ),
        f"weft {v['weft']}, commit {v['commit']}",
        *([m["gpu"]] if m.get("gpu") else []),
    ]
    busy = busy_note(data)
    return "\n".join([*lines, busy] if busy else lines)


def busy_note(data: Mapping[str, Any]) -> str:
    """A warning where other work ran when the benchmark began."""
    load = data["machine"]["load"]
    return (
        f"NOT IDLE: the load was {load} before the first case, so times mean little."
        if load > 0.5
        else ""
    )


def _rows(rows: Sequence[Mapping[str, Any]]) -> str:
    head = f"{'':36} {'peers':>6} {'target':>9} {'Weft':>7} {'quartiles':>11}"
    lines = [head, "-" * WIDTH]
    for row in rows:
        digits = row["digits"]
        spread = (
            ""
            if row["quartiles"] is None or row["quartiles"][0] == row["quartiles"][1]
            else "-".join(f"{q:.{digits}f}" for q in row["quartiles"])
        )
        status = {"shown": "", "unmeasured": ""}.get(row["status"], row["status"])
        found = (
            f"{row['why'][:19]:>19}"
            if row["value"] is None
            else f"{row['value']:7.{digits}f} {spread:>11}"
        )
        lines.append(
            f"{row['text']:36} {_number(row['peers'], digits):>6} {target(row):>9} {found} "
            f"{status}".rstrip()
        )
    return "\n".join(lines)


def target(row: Mapping[str, Any]) -> str:
    """ "<= 1.05", or what stands in its place."""
    return str(row["note"]) if row["target"] is None else f"<= {row['target']:.2f}"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def details(case: Mapping[str, Any]) -> str:
    """Medians of a case's contenders, each with its ratio to the first."""
    if case["error"]:
        return f"{case['name']}: FAILED. {' '.join(case['error'].split())}"
    metrics = METRICS[case["kind"]]
    lines = [
        f"{case['name']}: {setup_text(case)}; {case['rounds']} rounds, {case['seconds']:.0f} s",
        f"{'':16}" + "".join(f"{metric:>16}" for metric in metrics),
    ]
    first = next(iter(case["contenders"].values()))
    for name, found in case["contenders"].items():
        cells = [_cell(metric, found, first) for metric in metrics]
        if any(cells):
            lines.append((f"{name:16}" + "".join(f"{cell:>16}" for cell in cells)).rstrip())
    for name in ("weft.LoRA", "weft.DoRA", "weft.VeRA:256", "weft.LoRAFA"):
        lines += _kept(name, case["kept"].get(name, ()))
    return "\n".join(lines)


def setup_text(case: Mapping[str, Any]) -> str:
    """The shape in a few words, without what is usual."""
    s = case["setup"]
    if case["kind"] in ("large", "import", "kernels", "train"):
        return ", ".join([case["kind"], *case.get("notes", [])])
    parts = [s["model"], f"{s['tokens']} tokens", f"r={s['r']}", s["targets"], s["dtype"]]
    parts += [f"{s['accumulate']} micro-batches"] if s["accumulate"] > 1 else []
    parts += ["checkpointed"] if s["checkpointing"] else []
    parts += [f"{s['threads']} thread"] if s.get("threads") == 1 else []
    parts += case.get("notes", [])
    parts += [f"dropout {s['dropout']}"] if s["dropout"] else []
    return ", ".join(parts)


def _cell(metric: str, found: Mapping[str, Any], first: Mapping[str, Any]) -> str:
    if metric not in found:
        return ""
    value = found[metric]["median"]
    text = _amount(metric, value)
    base = first.get(metric, {}).get("median")
    return f"{text} {value / base:5.2f}" if base and metric not in DIFFERENCES else text


def _amount(metric: str, value: float) -> str:
    if metric in PLAIN:
        return f"{value:.0f}"
    return f"{value / 2**20:.1f} MiB" if metric in BYTES else _time(value)


def _time(seconds: float) -> str:
    for size, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= size:
            value = seconds / size
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
    return f"{seconds * 1e6:.0f} us"


def _kept(name: str, groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """The largest groups of what autograd keeps within the adapted layers."""
    inside = [g for g in groups if g["adapted"]]
    if not inside:
        return []
    total = sum(g["bytes"] for g in inside)
    largest = ", ".join(f"{g['dtype']}{g['shape']} {g['bytes'] / 2**20:.1f}" for g in inside[:3])
    return [f"{name}: {total / 2**20:.1f} MiB saved first within adapted layers; {largest}"]


def short_form(data: Mapping[str, Any]) -> str:
    """The README's table, in Markdown: the few headline rows, and how many of all targets are
    reached.
    """
    every = [row for case in data["cases"] for row in case["rows"]]
    targets = [row for row in every if row["main"] and row["target"] is not None]
    reached = sum(row["status"] == "ok" for row in targets)
    m, v = data["machine"], data["versions"]
    ran = (
        f"`{data['command']}`, {data['date'][:10]}, {m['cpu']}, {m['cores']} cores, torch "
        f"{v['torch']}, peft {v['peft']}, commit {v['commit']}. Ratios of medians of interleaved "
        "rounds."
    )
    lines = [
        ran,
        "",
        "| case | peft | target | Weft | |",
        "|---|---|---|---|---|",
        *(_markdown(row) for row in targets if row.get("headline")),
        "",
        f"{reached} of {len(targets)} targets are reached.",
    ]
    return "\n".join([*lines, busy_note(data)]).rstrip()


def _markdown(row: Mapping[str, Any]) -> str:
    value = row["why"] if row["value"] is None else f"{row['value']:.{row['digits']}f}"
    peers = _number(row["peers"], row["digits"])
    return f"| {row['text']} | {peers} | ≤ {row['target']:g} | {value} | {row['status']} |"
