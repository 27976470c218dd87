"""`weft analyze`: magnitude and direction of the weights over the checkpoints of runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..tasks.quantize import DTYPES
from .common import add_json_option, add_model_option, write_json, write_text

HELP = "magnitude and direction of the change of the weights over training, and their correlation"
TEXT, DATA = "analysis.txt", "analysis.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `weft analyze`."""
    add = parser.add_argument
    add_model_option(parser)
    add(
        "--adapters",
        required=True,
        nargs="+",
        metavar="[LABEL=]DIR",
        help="runs of weft train, or adapter directories in "
        "order of time; those with one label are one run",
    )
    add(
        "--targets",
        metavar="NAME,NAME",
        help="only matrices with these name endings, for example query,value (default: "
        "all that every run changes)",
    )
    add(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="dtype of the base's weights (default: the base's own)",
    )
    add(
        "--out",
        metavar="DIR",
        type=Path,
        help=f"write {TEXT}, {DATA} and the plot of the paper to this directory",
    )
    add_json_option(parser, "write all points and correlations to this file")


def run(args: argparse.Namespace) -> int:
    """Analyzes the runs. Returns 0. Raises ConfigError if --targets or --out is invalid."""
    from ..analysis.series import read_series
    from ..errors import ConfigError

    series = read_series(args.adapters)
    targets = [] if args.targets is None else args.targets.split(",")
    if not all(targets):
        raise ConfigError(f"--targets {args.targets!r}: a name is missing between two commas.")
    if args.out is not None and args.out.exists() and not args.out.is_dir():
        raise ConfigError(f"--out {str(args.out)!r} is a file; give a directory.")

    from ..analysis import plots, report
    from ..analysis.analyze import analyze
    from ..checkpoint.load import read
    from ..inference.pretrained import base_for, find_source
    from ..training.run_dir import check_recorded_base

    ref, first = find_source(args.model), read(series[0].places[0][1])
    model, missing = base_for(
        ref, first.base.get("class"), first.selected, args.dtype, first.words, first.new_rows
    )
    check_recorded_base(model, missing, [one.places[0][1] for one in series])
    analysis = analyze(model, series, targets)
    text = report.analysis_text(analysis, args.model)
    data = report.analysis_json(analysis, args.model)
    print(text)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        write_text(args.out / TEXT, text + "\n")
        write_json(args.out / DATA, data)
        print(f"\n{args.out}:\n{TEXT}, {DATA}, {plots.draw_changes(analysis, args.out)}")
    write_json(args.json, data)
    return 0
