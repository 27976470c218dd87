"""`weft score`: a task's metric on files, no model."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..tasks.multimodal.answers import PROTOCOLS
from .common import add_json_option, scores_text, write_json

HELP = "score a file of outputs against a file of references by a task's own metric; no model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--task",
        required=True,
        metavar="T",
        help="e2e, samsum, wikisql, commonsense, a GLUE set such as cola, vqav2, textvqa, vizwiz, gqa, "
        "nlvr2, coco-caption, tvqa, how2qa, tvc, yc2c, scienceqa, mmbench, pope",
    )
    add(
        "--references",
        required=True,
        metavar="FILE",
        type=Path,
        help="e2e: lines with an empty line between segments, or a csv with mr,ref; images and "
        "clips: the authors' file; else one per line, or a table; .gz too",
    )
    add(
        "--outputs",
        required=True,
        metavar="FILE",
        type=Path,
        help="one output per line, in the order of the references; images and clips: the authors' "
        "format, matched by id",
    )
    add(
        "--protocol",
        choices=PROTOCOLS,
        metavar="P",
        help="the rule of VQA accuracy: official, vl-adapter or textvqa (default: the benchmark's own)",
    )
    add_json_option(parser, "write the scores there too")


def run(args: argparse.Namespace) -> int:
    """Scores outputs against references. Returns 0."""
    from ..tasks.scoring import score_files

    report = score_files(args.task, args.references, args.outputs, args.protocol)
    print(scores_text(report))
    write_json(
        args.json,
        {
            "schema": 1,
            "task": args.task,
            "scores": report.scores,
            "reasons": report.reasons,
            "notes": report.notes,
        },
    )
    return 0
