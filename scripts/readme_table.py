"""Writes the table and the picture of a finished comparison into the README.

Usage: make demo && python scripts/readme_table.py weft-compare
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
START, END = "<!-- table: scripts/readme_table.py writes it -->", "<!-- /table -->"


def main() -> None:
    source = Path(sys.argv[1])
    table = (source / "table.txt").read_text(encoding="utf-8").rstrip()
    seen = time.strftime("%Y-%m-%d", time.gmtime((source / "table.txt").stat().st_mtime))
    where = f"`make demo`, {seen}, {platform.machine()} CPU, {os.cpu_count()} cores, Python {platform.python_version()}"
    (ROOT / "docs").mkdir(exist_ok=True)
    shutil.copy(source / "scores.png", ROOT / "docs" / "demo-scores.png")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    before, rest = text.split(START)
    after = rest.split(END)[1]
    block = f"{START}\n{where}:\n\n```\n{table}\n```\n{END}"
    (ROOT / "README.md").write_text(before + block + after, encoding="utf-8")


if __name__ == "__main__":
    main()
