"""`python -m scripts.results` writes docs/results/ from the records; `run NAME --data DIR` creates
a record.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import pages, run
from .experiments import EXPERIMENTS


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.results", description=(__doc__ or "").splitlines()[0]
    )
    commands = parser.add_subparsers(dest="do")
    making = commands.add_parser(
        "run", help="run an experiment with weft compare and write its record"
    )
    making.add_argument("name", choices=[experiment.name for experiment in EXPERIMENTS])
    making.add_argument(
        "--data", type=Path, required=True, help="the folder with SST-2, MRPC, CIFAR10, E2E, ..."
    )
    making.add_argument(
        "--out",
        type=Path,
        default=Path("runs/results"),
        help="the folder of the comparisons, which can be resumed",
    )
    args = parser.parse_args()
    if args.do == "run":
        return run.run(next(e for e in EXPERIMENTS if e.name == args.name), args.data, args.out)
    for path, text in pages.pages().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    print("docs/results/")
    return 0


if __name__ == "__main__":
    sys.exit(main())
