"""The files that a comparison leaves beside its runs: tables for people and machines, pictures, and
the report.
"""

from __future__ import annotations

import platform
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

from . import like, plots, report
from .document import Origin, document
from .markdown import markdown
from .page import page
from .results import Comparison
from .store import write_atomically
from .sweep import cores

TABLE, JSON, CSV, RUNS, MARKDOWN, PAGE = (
    "table.txt",
    "results.json",
    "results.csv",
    "runs.csv",
    "report.md",
    "report.html",
)


def write(
    found: Comparison, out: Path, command: str, printed: like.Printed | None = None
) -> list[str]:
    """Write everything and return the names; each file is written whole or not at all, and figures
    before pictures.

    printed: the paper's table that --like names.
    """
    beside = like.lay(found, printed) if printed is not None else None
    files = {
        TABLE: text(found, beside) + "\n",
        JSON: report.dumps(found),
        CSV: report.to_csv(found),
        RUNS: report.runs_csv(found),
    }
    for name, content in files.items():
        write_atomically(out / name, content)
    drawn = plots.draw(found, out)
    sections, heading = (
        document(found, _origin(found, command), drawn, beside),
        f"{found.task} on {found.model}",
    )
    write_atomically(out / MARKDOWN, markdown(heading, sections))
    write_atomically(
        out / PAGE, page(heading, sections, {name: (out / name).read_bytes() for name in drawn})
    )
    return [PAGE, MARKDOWN, *files, *drawn]


def text(found: Comparison, beside: like.Beside | None) -> str:
    """What is printed at the end, and under it the paper's table."""
    return report.text(found) + (f"\n\n{like.text(beside)}" if beside is not None else "")


def _origin(found: Comparison, command: str) -> Origin:
    versions = {
        **found.versions,
        "transformers": version("transformers"),
        "Python": platform.python_version(),
    }
    return Origin(
        command=command,
        date=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        machine=f"{found.device}, {cores()} cores, {platform.system()}",
        versions=versions,
    )
