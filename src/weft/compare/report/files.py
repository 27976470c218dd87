"""Writes the files of a comparison: table, JSON, CSV, pictures, and the long report."""

from __future__ import annotations

import platform
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

from ..devices import cores
from ..files import write_atomically
from . import data, paper_table, plots
from .comparison import Comparison
from .document import Origin, document
from .markdown import markdown
from .page import page
from .table import table_text

TABLE, JSON, CSV, RUNS, MARKDOWN, PAGE = (
    "table.txt",
    "results.json",
    "results.csv",
    "runs.csv",
    "report.md",
    "report.html",
)


def write_report(
    comparison: Comparison, out: Path, command: str, printed: paper_table.PaperTable | None = None
) -> list[str]:
    """Writes all files atomically, pictures last, and returns their names.

    `printed` is the paper's table that --like names.
    """
    paper = paper_table.side_by_side(comparison, printed) if printed is not None else None
    files = {
        TABLE: printed_text(comparison, paper) + "\n",
        JSON: data.to_json_text(comparison),
        CSV: data.rows_csv(comparison),
        RUNS: data.runs_csv(comparison),
    }
    for name, content in files.items():
        write_atomically(out / name, content)
    drawn = plots.draw(comparison, out)
    sections, heading = (
        document(comparison, _origin_of(comparison, command), drawn, paper),
        f"{comparison.task} on {comparison.model}",
    )
    write_atomically(out / MARKDOWN, markdown(heading, sections))
    write_atomically(
        out / PAGE, page(heading, sections, {name: (out / name).read_bytes() for name in drawn})
    )
    return [PAGE, MARKDOWN, *files, *drawn]


def printed_text(comparison: Comparison, paper: paper_table.SideBySide | None) -> str:
    """Returns the text printed at the end, with the paper's table if there is one."""
    return table_text(comparison) + (
        f"\n\n{paper_table.side_by_side_text(paper)}" if paper is not None else ""
    )


def _origin_of(comparison: Comparison, command: str) -> Origin:
    versions = {
        **comparison.versions,
        "transformers": version("transformers"),
        "Python": platform.python_version(),
    }
    return Origin(
        command=command,
        date=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        machine=f"{comparison.device}, {cores()} cores, {platform.system()}",
        versions=versions,
    )
