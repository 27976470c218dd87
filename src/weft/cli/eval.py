"""`weft eval`: a task's scores of a model, with an adapter or without."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

HELP = "score a model, with an adapter or without, on a task"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, metavar="M", help="the base: a local directory or a hub name")
    add("--adapter", metavar="DIR", help="what weft train, weft.save or peft wrote (default: the base alone)")
    add("--task", required=True, metavar="T", help="a task of weft compare --list, or e2e, samsum, wikisql, commonsense")
    add("--split", default="test", metavar="NAME", help="test (default) or validation")
    add("--limit", type=int, metavar="N", help="the first N examples")
    add("--batch", type=int, default=8, metavar="N", help="examples at a time (default: 8)")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="of the base's weights")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto (default): CUDA where there is one")
    add("--outputs", metavar="FILE", type=Path, help="write the generated answers there, one JSON object a line")
    add("--json", metavar="FILE", type=Path, help="write the scores there too")


def run(args: argparse.Namespace) -> int:
    from ..checkpoint.files import replace
    from ..errors import ConfigError
    from ..training.data import check_task, is_generation
    from ..training.use import evaluate, open_model

    if args.batch < 1 or (args.limit is not None and args.limit < 1):
        raise ConfigError("--batch and --limit are whole numbers, 1 or more.")
    check_task(args.task)
    if args.outputs is not None and not is_generation(args.task):
        raise ConfigError(f"--outputs: {args.task!r} generates nothing.")
    opened = open_model(args.model, args.adapter, args.dtype, args.device)
    found = evaluate(opened, args.task, args.split, args.limit, args.batch)
    print(f"{found.task}, {found.split}: {found.examples} examples")
    for name, score in found.report.scores.items():
        print(f"  {name:<12} " + (f"{score:.4f}" if score is not None else f"missing: {found.report.reasons.get(name, '')}"))
    for note in found.report.notes:
        print(note)
    data = {"schema": 1, "task": found.task, "split": found.split, "examples": found.examples,
            "scores": found.report.scores, "reasons": found.report.reasons}
    if args.json is not None:
        replace(args.json, lambda path: path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8"))
    if args.outputs is not None:
        lines = "".join(json.dumps({"output": text}, ensure_ascii=False) + "\n" for text in found.outputs or ())
        replace(args.outputs, lambda path: path.write_text(lines, encoding="utf-8"))
    return 0
