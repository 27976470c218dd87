"""`weft compare`: trains several methods on one task and prints one table."""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..tasks.quantize import DEVICES
from .common import add_json_option, write_text

if TYPE_CHECKING:
    from ..compare.report.comparison import Comparison
    from ..compare.report.paper_table import PaperTable
    from ..compare.request import Request

HELP = "train several methods on one task and print one table"
NEEDED = (
    "numpy",
    "sklearn",
    "scipy",
    "statsmodels",
    "matplotlib",
    "PIL",
    "tqdm",
    "transformers",
    "optuna",
    "psutil",
    "filelock",
)
UNPARSED = ("seeds", "head_lr", "warm_up", "weight_decay", "device", "workers", "out")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `weft compare`."""
    _add_subject(parser)
    _add_training(parser)
    _add_output(parser)


def _add_subject(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--model",
        metavar="M",
        help="a name of --list, a local transformers directory, or a hub name "
        "(default: digits-vit, or shapes-vl-bart for the shapes tasks, both embedded)",
    )
    add(
        "--task",
        metavar="T",
        help="digits, shapes-vqa, csv:FILE, image-folder:DIR, cifar100:DIR:per_class=10, e2e:DIR, "
        "boolq:DIR, ... of --list (default: digits)",
    )
    add(
        "--test",
        metavar="PATH",
        help="separate test data, a file or folder like the task's (default: 20 %% of the data)",
    )
    add(
        "--methods",
        metavar="M,M",
        help="for example lora,vera:r=64,dora:r=4:alpha=8 (default: those of the papers)",
    )
    add(
        "--seeds",
        metavar="N",
        type=_positive_int,
        help="runs per method that are scored on the test split (default: 3)",
    )


def _add_training(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--budget",
        metavar="NAME=N,..",
        help="what is equal: steps, parameters[=N] (chooses ranks; default N: those of the first "
        "method) or seconds=S per run; batch; and the largest number of examples of train, "
        "validation and test (default: steps=150,batch=20,validation=1000,test=2000)",
    )
    add(
        "--lr",
        metavar="METHOD=RATE,..",
        action="append",
        default=[],
        help="the peak learning rates to try for a method, instead of its default grid; can be "
        "repeated",
    )
    add(
        "--head-lr",
        metavar="RATE",
        type=_learning_rate,
        help="peak learning rate of the new head (default: 1e-2)",
    )
    add(
        "--warm-up",
        metavar="SHARE",
        type=_share,
        help="share of the steps in which the rate rises to its peak, before it "
        "falls to 0, both linearly (default: 0.1)",
    )
    add(
        "--weight-decay",
        metavar="X",
        type=_weight_decay,
        help="AdamW's weight decay of trained matrices (default: 0)",
    )
    add(
        "--device",
        choices=DEVICES,
        help="auto (default): CUDA if it is available and the model is large enough to be faster",
    )
    add(
        "--workers",
        metavar="N",
        type=_positive_int,
        help="parallel training processes (default: one per GPU; on the CPU one per core for "
        "small models, else one)",
    )


def _add_output(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--out", metavar="DIR", type=Path, help="output directory (default: weft-compare)")
    add_json_option(parser, "write the results to this file too")
    add(
        "--like",
        metavar="NAME",
        help="show the rows under those that a paper prints, and list the differences: a name of "
        "--list, for example vera-paper-glue",
    )
    add("--resume", action="store_true", help="continue after the finished runs in --out")
    add(
        "--study",
        metavar="URL",
        help="share the runs with other machines: postgresql+psycopg://user@host/database, with "
        "#NAME after it for one of several studies (default: a file in --out)",
    )
    add("--retry", action="store_true", help="try failed runs once more")
    add("--list", action="store_true", help="print the names of methods, tasks and models")


def run(args: argparse.Namespace) -> int:
    """Returns 0 if every row finished, 1 if one failed, 130 if interrupted; finished runs are kept."""
    if args.list:
        return _list_names(args)
    _check_installed()
    request = _request(args)
    printed = _paper_table(args.like, request)
    from ..compare.compare import compare
    from ..compare.run.directory import has_comparison
    from ..compare.run.progress import Progress

    if request.resume and request.study is None and not has_comparison(request.location):
        print(f"Nothing to resume in {request.out}; starting a new comparison.", file=sys.stderr)
    try:
        with Progress(sys.stderr) as progress, _handling_signals():
            comparison = compare(request, progress)
        _write_results(comparison, request, args, printed)
    except KeyboardInterrupt:
        return _interrupted(request, args.words)
    return 0 if comparison.ok else 1


@contextmanager
def _handling_signals() -> Iterator[None]:
    """Handles SIGTERM, which clusters send before they stop a machine, and SIGHUP, which a terminal
    sends when it closes, like Ctrl-C.
    """
    from ..training import terminal

    # Only the main thread can set handlers.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    terminals = terminal.open_terminals()

    def stop(number: int, frame: Any) -> None:
        if number == getattr(signal, "SIGHUP", None):
            terminal.leave(terminals)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in terminal.signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _check_installed() -> None:
    """Raises ModuleNotFoundError now instead of after the training."""
    for name in NEEDED:
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def _request(args: argparse.Namespace) -> Request:
    """Returns the request. Raises ConfigError if an option is invalid."""
    from ..compare.plan import entries
    from ..compare.request import default_request, parse_budget
    from ..compare.run.study_location import parse_study_url
    from ..errors import ConfigError
    from ..tasks import ShapesRef, TaskRef, find_any
    from ..tasks.models import find_model

    given: dict[str, Any] = {
        "model": _parsed(find_model, args.model),
        "entries": _parsed(entries.parse_methods, args.methods),
        "task": find_any(args.task, args.test) if args.task is not None else None,
        "budget": _parsed(parse_budget, args.budget),
        "study": _parsed(parse_study_url, args.study),
        **{name: getattr(args, name) for name in UNPARSED},
    }
    if args.test is not None and args.task is None:
        raise ConfigError(
            "--test: the task 'digits' has its own test data. Give --task csv:FILE or "
            "image-folder:DIR."
        )
    if args.model is None and isinstance(given["task"], ShapesRef):
        given["model"] = find_model("shapes-vl-bart")
    chosen = {key: value for key, value in given.items() if value is not None}
    request = default_request(resume=args.resume, retry=args.retry, **chosen)
    if args.head_lr is not None and all(entry.method == "Head" for entry in request.entries):
        raise ConfigError("--head-lr: if only the head is trained, use --lr head=RATE.")
    if args.head_lr is not None and not isinstance(request.task, TaskRef):
        raise ConfigError(
            f"--head-lr: the task {request.task.name!r} generates text and has no new head."
        )
    from dataclasses import replace

    return replace(request, entries=entries.with_learning_rates(request.entries, args.lr))


def _parsed(reader: Callable[[str], Any], text: str | None) -> Any:
    return reader(text) if text is not None else None


def _paper_table(name: str | None, request: Request) -> PaperTable | None:
    from ..compare.report.paper_table import find_paper_table

    return find_paper_table(name, request.task.name) if name is not None else None


def _write_results(
    comparison: Comparison, request: Request, args: argparse.Namespace, printed: PaperTable | None
) -> None:
    from ..compare.report import data, files, paper_table, table
    from ..compare.run.locks import file_lock
    from ..compare.run.study_location import LOCK, without_password

    paper = paper_table.side_by_side(comparison, printed) if printed is not None else None
    print(files.printed_text(comparison, paper))
    if args.json is not None:
        write_text(args.json, data.to_json_text(comparison))
    with file_lock(request.out, LOCK):  # other processes write reports to the same --out
        names = files.write_report(
            comparison,
            request.out,
            shlex.join(["weft", *map(without_password, args.words)]),
            printed,
        )
    print("\n" + table.wrap(f"In {request.out}/: {', '.join([*names, 'adapters/'])}"))


def _interrupted(request: Request, words: list[str]) -> int:
    from ..compare.run.directory import finished_runs, has_comparison
    from ..compare.run.study_location import without_password

    resumable = has_comparison(request.location)
    finished = finished_runs(request.location) if resumable else 0
    command = shlex.join(
        [
            "weft",
            *map(without_password, words),
            *(["--resume"] if resumable and not request.resume else []),
        ]
    )
    print(
        f"\nInterrupted. {finished} finished runs are stored in "
        f"{request.location if request.study else request.out}. "
        f"Continue with:\n  {command}",
        file=sys.stderr,
    )
    return 130


def _list_names(args: argparse.Namespace) -> int:
    from ..errors import ConfigError

    others = {key: value for key, value in vars(args).items() if key not in ("list", "words")}
    if any(value not in (None, False, []) for value in others.values()):
        raise ConfigError("--list prints names; remove the other options.")
    from ..compare.plan import entries
    from ..compare.report import paper_table
    from ..methods import METHODS
    from ..tasks import FAMILIES, GENERATION, SHAPES
    from ..tasks.models import EMBEDDED
    from ..tasks.packaged import PACKAGED
    from . import listed

    methods = {entry.label: entry for entry in entries.parse_methods(",".join(METHODS))}
    print("methods (--methods lora,vera:r=64)", *entries.method_lines(methods), "", sep="\n")
    print(
        "tasks (--task)",
        *(listed(name, about, 21) for name, about in FAMILIES.items()),
        "",
        sep="\n",
    )
    print(
        "tasks whose answers are text (--task; needs a causal language model)",
        *(listed(name, about, 21) for name, about in GENERATION.items()),
        "",
        sep="\n",
    )
    print(
        "tasks with images or clips (--task; needs a VL-BART, such as shapes-vl-bart)",
        *(listed(name, about, 21) for name, about in SHAPES.items()),
        "",
        sep="\n",
    )
    packaged = (
        f"{model.what}; " + ("installed" if model.place() else model.install)
        for model in PACKAGED.values()
    )
    print(
        "models (--model)",
        *(listed(name, "embedded", 21) for name in EMBEDDED),
        *(listed(name, about, 21) for name, about in zip(PACKAGED, packaged, strict=True)),
        "  a directory that transformers can read",
        "  a name on the hub, such as google/vit-base-patch16-224",
        sep="\n",
    )
    print(
        "\nprinted tables (--like)",
        *(listed(name, table.title, 27) for name, table in paper_table.paper_tables().items()),
        sep="\n",
    )
    return 0


def _positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, 1 or more")
    return int(text)


def _share(text: str) -> float:
    value = _float_or_nan(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} must be a number from 0 to below 1, for example 0.1"
        )
    return value


def _weight_decay(text: str) -> float:
    value = _float_or_nan(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} must be a number, 0 or more, for example 0.01")
    return value


def _float_or_nan(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def _learning_rate(text: str) -> float:
    value = _float_or_nan(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} must be a number above 0, for example 1e-2")
    return value
