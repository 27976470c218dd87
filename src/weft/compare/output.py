"""The files that a comparison leaves beside its runs: tables for people and machines, pictures, and the report."""

from __future__ import annotations

import platform
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

from . import plots, report
from .document import Origin, document
from .markdown import markdown
from .page import page
from .results import Comparison
from .store import write_atomically
from .sweep import cores

TABLE, JSON, CSV, RUNS, MARKDOWN, PAGE = "table.txt", "results.json", "results.csv", "runs.csv", "report.md", "report.html"


def write(found: Comparison, out: Path, command: str) -> list[str]:
    """Write everything and return the names; each file is written whole or not at all, and figures before pictures."""
    files = {TABLE: report.text(found) + "\n", JSON: report.dumps(found), CSV: report.to_csv(found),
             RUNS: report.runs_csv(found)}
    for name, content in files.items():
        write_atomically(out / name, content)
    drawn = plots.draw(found, out)
    sections, heading = document(found, _origin(found, command), drawn), f"{found.task} on {found.model}"
    write_atomically(out / MARKDOWN, markdown(heading, sections))
    write_atomically(out / PAGE, page(heading, sections, {name: (out / name).read_bytes() for name in drawn}))
    return [PAGE, MARKDOWN, *files, *drawn]


def _origin(found: Comparison, command: str) -> Origin:
    versions = {**found.versions, "transformers": version("transformers"), "Python": platform.python_version()}
    return Origin(command=command, date=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
                  machine=f"{found.device}, {cores()} cores, {platform.system()}", versions=versions)
