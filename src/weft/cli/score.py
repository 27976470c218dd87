"""`weft score`: a task's metric on files, no model."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

HELP = "score a file of outputs against a file of references by a task's own metric; no model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--task",
        required=True,
        metavar="T",
        help="e2e, samsum, wikisql, commonsense, a GLUE set such as cola",
    )
    add(
        "--references",
        required=True,
        metavar="FILE",
        type=Path,
        help="e2e: lines with an empty line between segments, or a csv with mr,ref; else one a "
        "line, or a table; .gz too",
    )
    add(
        "--outputs",
        required=True,
        metavar="FILE",
        type=Path,
        help="one output a line, in the order of the references",
    )
    add("--json", metavar="FILE", type=Path, help="write the scores there too")


def run(args: argparse.Namespace) -> int:
    from ..errors import ConfigError
    from ..tasks.scoring import score_files

    if args.json is not None and not args.json.absolute().parent.is_dir():
        raise ConfigError(
            f"--json {args.json}: there is no folder {args.json.absolute().parent} to write it in."
        )
    report = score_files(args.task, args.references, args.outputs)
    print(as_text(report))
    if args.json is not None:
        from ..checkpoint.files import replace

        data = {
            "schema": 1,
            "task": args.task,
            "scores": report.scores,
            "reasons": report.reasons,
            "notes": report.notes,
        }
        text = json.dumps(data, indent=1) + "\n"
        replace(args.json, lambda path: path.write_text(text, encoding="utf-8"))
    return 0


def as_text(report: Any) -> str:
    """One metric a line, "missing" and why where it could not run; then the notes."""
    width = max(len(name) for name in report.scores)
    lines = [
        f"{name:<{width}}  "
        + (f"{value:.4f}" if value is not None else f"missing: {report.reasons[name]}")
        for name, value in report.scores.items()
    ]
    return "\n".join([*lines, *report.notes])
