"""Put the tables of a finished benchmark where they are shown: five rows into the README, all rows
into the docs.

Usage: make bench && python scripts/bench_table.py benchmarks/results/quick.json
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import report, store  # noqa: E402

START, END = "<!-- benchmark: scripts/bench_table.py writes it -->", "<!-- /benchmark -->"


def rows(data: Mapping[str, Any]) -> str:
    """Where it ran, the rows with targets, and what else was measured, as the command prints
    them.
    """
    return "```text\n" + report.summary(data) + "\n```"


# The README's rows: what the methods cost and what mixed batches cost, wins and losses.
HIGHLIGHTS = (
    "LoRA, 1024 tokens / limit",
    "DoRA, 1024 tokens / LoRA",
    "DoRA, 4096 tokens / LoRA",
    "VeRA r=256, 1024 tokens / limit",
    "16 rows, 16 adapters / one LoRA",
)


def highlights(data: Mapping[str, Any]) -> str:
    """The README's five rows, with where they ran. Raises SystemExit if the run lacks one of them,
    so that a missed target cannot disappear.
    """
    chosen = [[row for row in case["rows"] if row["text"] in HIGHLIGHTS] for case in data["cases"]]
    missing = set(HIGHLIGHTS) - {row["text"] for rows in chosen for row in rows}
    if missing:
        raise SystemExit(f"the README's rows {sorted(missing)} are not in this run.")
    cases = [case | {"rows": rows} for case, rows in zip(data["cases"], chosen, strict=True)]
    return report.short_form({**data, "cases": cases})


PLACES: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "README.md": highlights,
    "docs/performance.md": rows,
}


def filled(text: str, block: str, page: str) -> str:
    """`text` with the block between its two marks. Raises SystemExit where the marks are not there
    once each.
    """
    if text.count(START) != 1 or text.count(END) != 1:
        raise SystemExit(
            f"{page} needs the lines {START} and {END} once each, where the table shall stand."
        )
    before, rest = text.split(START)
    return f"{before}{START}\n{block}\n{END}{rest.split(END)[1]}"


def main() -> None:
    data = store.read(Path(sys.argv[1]))
    for page, form in PLACES.items():
        path = ROOT / page
        path.write_text(
            filled(path.read_text(encoding="utf-8"), form(data), page), encoding="utf-8"
        )


if __name__ == "__main__":
    main()
