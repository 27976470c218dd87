"""`weft eval`: the scores of a model on a task, with or without an adapter, by Weft's protocol or
lm-eval's.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .common import (
    add_adapter_option,
    add_device_options,
    add_json_option,
    add_model_option,
    output_file,
    print_notes,
    write_json,
    write_text,
)

HELP = "score a model on a task, with or without an adapter"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_model_option(parser)
    add_adapter_option(parser)
    add(
        "--task",
        metavar="T",
        help="a task of weft compare --list, or e2e, samsum, wikisql, commonsense",
    )
    add(
        "--data",
        metavar="FILE",
        help="in place of --task: the loss on held-out samples, in a format of weft train (prompt and "
        "completion, messages with or without images, text)",
    )
    add(
        "--lm-eval",
        metavar="T,T",
        help="in place of --task: tasks of lm-evaluation-harness, for example arc_easy,piqa, by "
        "log-likelihood (needs the package lm-eval)",
    )
    add(
        "--lm-eval-path",
        metavar="DIR",
        type=Path,
        help="with --lm-eval: a folder with your own task files",
    )
    add(
        "--shots",
        type=int,
        metavar="N",
        help="with --lm-eval: examples in the prompt (default: the task's own)",
    )
    add("--split", metavar="NAME", help="with --task: test (default) or validation")
    add("--limit", type=int, metavar="N", help="the first N examples (of each task)")
    add("--batch", type=int, default=8, metavar="N", help="examples per batch (default: 8)")
    add_device_options(parser)
    add(
        "--outputs",
        metavar="FILE",
        type=output_file,
        help="write the generated answers there, one JSON object per line",
    )
    add_json_option(parser, "write the scores there too")


def run(args: argparse.Namespace) -> int:
    """Evaluates a model or an adapter. Returns 0. Raises ConfigError if the options do not fit."""
    from ..encoding.samples import check_task, is_generation, is_image
    from ..errors import ConfigError
    from ..inference.evaluate import evaluate, evaluate_images
    from ..inference.opened import open_model

    if args.batch < 1 or (args.limit is not None and args.limit < 1):
        raise ConfigError("--batch and --limit are whole numbers, 1 or more.")
    _check_arguments(args)
    if args.lm_eval is not None:
        return _harness(args)
    if args.data is not None:
        return _held_out(args)
    check_task(args.task)
    if args.outputs is not None and not is_generation(args.task):
        raise ConfigError(f"--outputs: {args.task!r} generates no text.")
    selection = (args.task, args.split or "test", args.limit, args.batch)
    if is_image(args.task):
        found = evaluate_images(
            args.model,
            args.adapter,
            *selection,
            args.dtype,
            args.device,
            args.other_base,
            args.quantize,
        )
    else:
        opened = open_model(
            args.model, args.adapter, args.dtype, args.device, None, args.other_base, args.quantize
        )
        print_notes(opened.notes)
        found = evaluate(opened, *selection)
    _report(args, found)
    return 0


def _report(args: argparse.Namespace, found: Any) -> None:
    print(f"{found.task}, {found.split}: {found.examples} examples")
    for name, score in found.report.scores.items():
        print(
            f"  {name:<12} "
            + (
                f"{score:.4f}"
                if score is not None
                else f"missing: {found.report.reasons.get(name, '')}"
            )
        )
    for note in found.report.notes:
        print(note)
    data = {
        "schema": 1,
        "task": found.task,
        "split": found.split,
        "examples": found.examples,
        "scores": found.report.scores,
        "reasons": found.report.reasons,
    }
    write_json(args.json, data)
    if args.outputs is not None:
        lines = "".join(
            json.dumps({"output": text}, ensure_ascii=False) + "\n" for text in found.outputs or ()
        )
        write_text(args.outputs, lines)


def _check_arguments(args: argparse.Namespace) -> None:
    from ..errors import ConfigError

    if sum(given is not None for given in (args.task, args.lm_eval, args.data)) != 1:
        raise ConfigError("give one of --task T, --lm-eval T,T and --data FILE.")
    for other, idle in (("task", ("split", "outputs")), ("lm_eval", ("lm_eval_path", "shots"))):
        for name in idle if getattr(args, other) is None else ():
            if getattr(args, name) is not None:
                raise ConfigError(
                    f"--{name.replace('_', '-')} does nothing without --{other.replace('_', '-')}."
                )
    if args.shots is not None and args.shots < 0:
        raise ConfigError("--shots is a whole number, 0 or more.")


def _held_out(args: argparse.Namespace) -> int:
    from ..inference.opened import open_model
    from ..training.held_out import has_images, held_out_loss, read_held_out

    samples = read_held_out(args.data, args.limit)
    opened = open_model(
        args.model,
        args.adapter,
        args.dtype,
        args.device,
        None,
        args.other_base,
        args.quantize,
        images=has_images(samples),
    )
    print_notes(opened.notes)
    found = held_out_loss(opened, samples, args.batch)
    print(f"{args.data}: {found.samples} samples")
    for name, score in found.scores.items():
        print(f"  {name:<14} {score:.4f}")
    for note in found.notes:
        print(note)
    data = {"schema": 1, "data": args.data, "samples": found.samples, "scores": dict(found.scores)}
    write_json(args.json, data)
    return 0


def _harness(args: argparse.Namespace) -> int:
    from ..inference.harness import find_tasks, harness_scores
    from ..inference.opened import open_model

    names = [name.strip() for name in args.lm_eval.split(",") if name.strip()]
    index = find_tasks(names, args.lm_eval_path)
    opened = open_model(
        args.model, args.adapter, args.dtype, args.device, None, args.other_base, args.quantize
    )
    print_notes(opened.notes)
    found = harness_scores(opened, names, index, args.shots, args.limit, args.batch)
    print(f"lm-eval {found.release}, log-likelihood")
    for task, scores in found.scores.items():
        print(
            f"{task}: {found.examples.get(task, '?')} examples, {found.shots.get(task, '?')} in "
            "the prompt"
        )
        for name, value in scores.items():
            print(f"  {name:<16} {value:.4f}")
    write_json(
        args.json,
        {
            "schema": 1,
            "lm_eval": found.release,
            "scores": found.scores,
            "versions": found.versions,
            "shots": found.shots,
            "examples": found.examples,
        },
    )
    return 0
