"""`weft train`: one run from a YAML configuration."""

from __future__ import annotations

import argparse
import shlex
import sys

HELP = "train an adapter as a YAML file says: data, method, rates, checkpoints, report"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("config", metavar="config.yaml", help="what to train; docs/train.md has every key")
    add(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="override a key, for example optim.lr=1e-3; may be given again",
    )
    add(
        "--resume",
        action="store_true",
        help="go on from the newest whole checkpoint of the run in its directory",
    )
    add(
        "--preview",
        action="store_true",
        help="show samples as the model reads them, with what is in the loss, and stop",
    )


def run(args: argparse.Namespace) -> int:
    """0: trained to the end; 130: stopped by Ctrl-C with a checkpoint."""
    from ..errors import ConfigError
    from ..training.config import read_config

    config = read_config(args.config, args.set)
    if args.preview and args.resume:
        raise ConfigError("--preview trains nothing, so there is nothing to resume.")
    from ..training import processes
    from ..training.run import finished, preview, train

    if args.preview:
        print(preview(config))
        return 0
    if args.resume and (steps := finished(config)) is not None:
        print(
            f"The run in {config.out} is finished, at step {steps}; there is nothing to go on "
            "with.",
            file=sys.stderr,
        )
        return 0
    done = train(config, args.resume)
    if not processes.first():
        return 0 if done.finished else 130
    if not done.finished:
        again = [word for word in args.words if word != "--resume"]
        print(
            f"Stopped at step {done.step}; everything is kept in {done.out}. Go on with:\n"
            f"  {shlex.join(['weft', *again, '--resume'])}",
            file=sys.stderr,
        )
        return 130
    print(f"{done.out}: adapter/, README.md, curves.png, log.jsonl, run.json, config.yaml")
    return 0
