"""`weft inspect`: what an adapter directory is, checked."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

HELP = "what an adapter directory holds, every tensor checked"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "directory", metavar="DIR", help="what weft.save or peft's save_pretrained wrote"
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write it there too")


def run(args: argparse.Namespace) -> int:
    from ..checkpoint import inspect
    from ..checkpoint.files import replace

    found = inspect(args.directory)
    print(found)
    if args.json is not None:
        text = json.dumps(found.to_json(), indent=1) + "\n"
        replace(args.json, lambda path: path.write_text(text, encoding="utf-8"))
    return 0
