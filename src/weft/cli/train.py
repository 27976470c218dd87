"""`weft train`: one run from a YAML configuration."""

from __future__ import annotations

import argparse
import shlex
import sys

HELP = "train an adapter from a YAML file: data, method, rates, checkpoints, report"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("config", metavar="config.yaml", help="the configuration; docs/train.md has every key")
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
        help="resume from the newest whole checkpoint in the run's directory",
    )
    add(
        "--preview",
        action="store_true",
        help="show samples as the model reads them, with the tokens in the loss, and stop",
    )


def run(args: argparse.Namespace) -> int:
    """Returns 0 if training finished, 130 if Ctrl-C stopped it with a checkpoint.

    Raises ConfigError if --preview and --resume are given together.
    """
    from ..errors import ConfigError
    from ..training.config.read import read_config

    config = read_config(args.config, args.set)
    if args.preview and args.resume:
        raise ConfigError("--preview trains nothing, so there is nothing to resume.")
    from ..training import processes
    from ..training.previews import preview
    from ..training.run import finished_step, train

    if args.preview:
        print(preview(config))
        return 0
    if args.resume and (step := finished_step(config)) is not None:
        print(
            f"The run in {config.out} is already finished, at step {step}; nothing to resume.",
            file=sys.stderr,
        )
        return 0
    done = train(config, args.resume)
    if not processes.first():
        return 0 if done.finished else 130
    if not done.finished:
        again = [word for word in args.words if word != "--resume"]
        print(
            f"Stopped at step {done.step}; the checkpoint is in {done.out}. Resume with:\n"
            f"  {shlex.join(['weft', *again, '--resume'])}",
            file=sys.stderr,
        )
        return 130
    print(f"{done.out}: adapter/, README.md, curves.png, log.jsonl, run.json, config.yaml")
    return 0
