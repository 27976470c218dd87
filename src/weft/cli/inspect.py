"""`weft inspect`: describes and checks an adapter's directory."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

HELP = "describe an adapter's directory, with every tensor checked"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "directory",
        metavar="DIR",
        help="a directory that weft.save, weft train or peft's save_pretrained wrote",
    )
    parser.add_argument(
        "--json", metavar="FILE", type=Path, help="also write the description to this file"
    )


def run(args: argparse.Namespace) -> int:
    from ..checkpoint import inspect
    from ..checkpoint.files import replace

    found = inspect(args.directory)
    print(found)
    if args.json is not None:
        text = json.dumps(found.to_json(), indent=1) + "\n"
        replace(args.json, lambda path: path.write_text(text, encoding="utf-8"))
    return 0
