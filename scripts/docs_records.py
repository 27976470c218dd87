"""Results of `weft compare`: stored as docs/records/NAME.json, read by docs_tables.py for the
methods' pages.

Usage: python scripts/docs_records.py weft-compare NAME "weft compare --methods ..." [--busy]

The record has the command, the date and the machine. --busy: the machine had other work, so step
times are left out. The README's table (scripts/readme_table.py) is read as a record too.
"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "docs" / "records"
CLAIMS = "claims.json"  # of scripts/claims.py, and no comparison
KEPT = ("method", "trainable", "bytes", "score_mean", "score_interval", "step_ratio", "peak_bytes")


def main() -> None:
    source, name, command, *flags = sys.argv[1:]
    found = json.loads(Path(source, "results.json").read_text(encoding="utf-8"))
    date = time.strftime("%Y-%m-%d", time.gmtime(Path(source, "results.json").stat().st_mtime))
    machine = (
        f"{platform.machine()} CPU, {os.cpu_count()} cores, Python {platform.python_version()}"
    )
    rows = [
        {key: row[key] for key in KEPT} | {"name": row["config"]["method"]} for row in found["rows"]
    ]
    if "--busy" in flags:
        for row in rows:
            row["step_ratio"] = None
    record = {
        "command": command,
        "date": date,
        "machine": machine,
        "busy": "--busy" in flags,
        "seeds": found["seeds"],
        "task": found["task"],
        "model": found["model"],
        "rows": rows,
    }
    RECORDS.mkdir(exist_ok=True)
    (RECORDS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def measured(method: str) -> str:
    """The rows of a method in all records, as a Markdown table with its sources."""
    rows, sources = [], []
    for source, found in [
        readme(),
        *map(stored, sorted({*RECORDS.glob("*.json")} - {RECORDS / CLAIMS})),
    ]:
        mine = [
            cells
            for name, cells in found
            if name == method and cells[0] not in [r[0] for r in rows]
        ]
        rows += mine
        sources += [source] if mine else []
    if not rows:
        return "Not measured yet.\n"
    head = "| setting | trained numbers | file | accuracy % | step | peak |\n| --- | ---: | ---: | ---: | ---: | ---: |\n"
    return (
        head
        + "".join("| " + " | ".join(row) + " |\n" for row in rows)
        + "".join(f"\n{s}\n" for s in sources)
        + "\nStep: time of a training step divided by that of the frozen base. The file contains the "
        "head's 245 numbers, the count does not. The margin is half of the 95 % t-interval over the "
        "seeds; most differences between methods are smaller.\n"
    )


def readme() -> tuple[str, list[tuple[str, list[str]]]]:
    """The table in the README: its source, and the name and cells of each row."""
    text = (
        (ROOT / "README.md")
        .read_text(encoding="utf-8")
        .split("<!-- table:")[1]
        .split("<!-- /table -->")[0]
    )
    where = next(line for line in text.splitlines() if line.startswith("`")).rstrip(":")
    body = text.split("-----\n", 1)[1].split("\n\n", 1)[0]
    rows = [re.split(r"\s{2,}", line.strip()) for line in body.splitlines()]
    return f"{where}.", [(row[0], [*row[:4], f"{row[5]} ×", row[6]]) for row in rows]


def stored(path: Path) -> tuple[str, list[tuple[str, list[str]]]]:
    record = json.loads(path.read_text(encoding="utf-8"))
    busy = "; the machine had other work, so step times are left out" if record["busy"] else ""
    what = f"{record['task']} on {record['model']}, {record['seeds']} seeds"
    source = (
        f"{what}, {record['date']}, {record['machine']}{busy}:\n\n"
        f"```console\n$ {record['command']}\n```"
    )
    return source, [(row["name"], _cells(row)) for row in record["rows"]]


def _cells(row: dict[str, Any]) -> list[str]:
    low, high = row["score_interval"]
    step = f"{row['step_ratio']:.2f} ×" if row["step_ratio"] is not None else "–"
    return [
        row["method"],
        f"{row['trainable']:,}",
        _size(row["bytes"]),
        f"{100 * row['score_mean']:.1f} ± {50 * (high - low):.1f}",
        step,
        _size(row["peak_bytes"]),
    ]


def _size(nbytes: float) -> str:
    kib = nbytes / 1024
    return f"{kib:.3g} KiB" if kib < 1000 else f"{kib / 1024:.3g} MiB"


if __name__ == "__main__":
    main()
