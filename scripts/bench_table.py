"""Writes the tables of a finished benchmark: the headline rows into the README, all rows into the
docs.

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
    """Returns machine and versions, the rows with targets, and the other rows, as the command
    prints them.
    """
    return "```text\n" + report.summary(data) + "\n```"


PAGES: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "README.md": report.short_form,
    "docs/performance.md": rows,
}


def filled(text: str, block: str, page: str) -> str:
    """Returns `text` with the block between its two marks. Raises SystemExit if one of the marks is
    missing or there twice.
    """
    if text.count(START) != 1 or text.count(END) != 1:
        raise SystemExit(f"{page} needs the lines {START} and {END} once each, around the table.")
    before, rest = text.split(START)
    return f"{before}{START}\n{block}\n{END}{rest.split(END)[1]}"


def main() -> None:
    data = store.read(Path(sys.argv[1]))
    for page, form in PAGES.items():
        path = ROOT / page
        path.write_text(
            filled(path.read_text(encoding="utf-8"), form(data), page), encoding="utf-8"
        )


if __name__ == "__main__":
    main()
