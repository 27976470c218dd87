"""Put the short table of a finished benchmark into the README.

Usage: make bench && python scripts/bench_table.py benchmarks/results/quick.json
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import report, store  # noqa: E402

START, END = "<!-- table: scripts/bench_table.py writes it -->", "<!-- /benchmark table -->"


def main() -> None:
    data = store.read(Path(sys.argv[1]))
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    if text.count(START) != 1 or text.count(END) != 1:
        raise SystemExit(f"README.md needs the lines {START} and {END} once each, where the table shall stand.")
    before, rest = text.split(START)
    block = f"{START}\n{report.short_form(data)}\n{END}"
    readme.write_text(before + block + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
