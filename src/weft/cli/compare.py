"""`weft compare`: train several methods on one task and print one honest table."""

from __future__ import annotations

import argparse
import importlib.util
import re
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..compare.like import Printed
    from ..compare.request import Request
    from ..compare.results import Comparison

HELP = "train several methods on one task and print one honest table"
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
AS_THEY_ARE = ("seeds", "head_lr", "warm_up", "weight_decay", "device", "workers", "out")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--model",
        metavar="M",
        help="a name of --list, a local transformers directory, or a hub name "
        "(default: digits-vit, embedded)",
    )
    add(
        "--task",
        metavar="T",
        help="digits, csv:FILE, image-folder:DIR, cifar100:DIR:per_class=10, e2e:DIR, boolq:DIR, "
        "... "
        "of --list (default: digits)",
    )
    add(
        "--test",
        metavar="PATH",
        help="test data of its own, a file or folder like the task's; else 20 %% is held out",
    )
    add(
        "--methods",
        metavar="M,M",
        help="for example lora,vera:r=64,dora:r=4:alpha=8 (default: those of the papers)",
    )
    add(
        "--seeds",
        metavar="N",
        type=_whole,
        help="runs of every method that are scored on the test split (default: 3)",
    )
    add(
        "--budget",
        metavar="NAME=N,..",
        help="what is equal: steps, parameters[=N] (ranks chosen for it; N of the first "
        "method) or seconds=S a run; batch, and the most examples of train, "
        "validation and test (default: "
        "steps=150,batch=20,validation=1000,test=2000)",
    )
    add(
        "--lr",
        metavar="METHOD=RATE,..",
        action="append",
        default=[],
        help="the peak learning rates to try for a method, in place of its own grid; may be given "
        "again",
    )
    add(
        "--head-lr",
        metavar="RATE",
        type=_rate,
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
        "--weight-decay", metavar="X", type=_decay, help="AdamW's, of trained matrices (default: 0)"
    )
    add(
        "--device",
        choices=("auto", "cpu", "cuda"),
        help="auto (default): CUDA where there is one and the model is large enough to gain",
    )
    add(
        "--workers",
        metavar="N",
        type=_whole,
        help="training processes side by side (default: one a GPU; on the "
        "CPU one a core for small models, else one)",
    )
    add("--out", metavar="DIR", type=Path, help="where everything is kept (default: weft-compare)")
    add("--json", metavar="FILE", type=Path, help="write the results there too")
    add(
        "--like",
        metavar="NAME",
        help="lay the rows under those that a paper prints, and say what differs: a name of "
        "--list, for example vera-paper-glue",
    )
    add("--resume", action="store_true", help="go on from the finished runs in --out")
    add(
        "--study",
        metavar="URL",
        help="share the runs with other machines: postgresql+psycopg://user@host/database, and "
        "#NAME behind it for one of several studies (default: a file in --out)",
    )
    add("--retry", action="store_true", help="try runs that failed once more")
    add("--list", action="store_true", help="print methods, tasks and models by name")


def run(args: argparse.Namespace) -> int:
    """0: every row finished; 1: one failed; 130: interrupted, and what had finished is kept."""
    if args.list:
        return _list(args)
    _check_installed()
    request = _request(args)
    _check_json(args.json)
    printed = _printed(args.like, request)
    from ..compare.progress import Progress
    from ..compare.store import is_there
    from ..compare.sweep import compare

    if request.resume and request.study is None and not is_there(request.place):
        print(f"There is nothing to resume in {request.out}; starting anew.", file=sys.stderr)
    try:
        with Progress(sys.stderr) as shown, _terminable():
            found = compare(request, shown)
        _write(found, request, args, printed)
    except KeyboardInterrupt:
        return _interrupted(request, args.words)
    return 0 if found.ok else 1


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM, with which clusters take machines back, is like Ctrl-C: the runs in work are given
    back.
    """
    if threading.current_thread() is not threading.main_thread():  # there no handler can be set
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _check_installed() -> None:
    """Fail now and not after the training."""
    for name in NEEDED:
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def _request(args: argparse.Namespace) -> Request:
    """Raises ConfigError for whatever cannot be meant."""
    from ..compare import entries
    from ..compare.place import parse_study
    from ..compare.request import default_request, parse_budget
    from ..errors import ConfigError
    from ..tasks import GenerationRef, find_any
    from ..tasks.models import find_model

    given: dict[str, Any] = {
        "model": _read(find_model, args.model),
        "entries": _read(entries.parse_methods, args.methods),
        "task": find_any(args.task, args.test) if args.task is not None else None,
        "budget": _read(parse_budget, args.budget),
        "study": _read(parse_study, args.study),
        **{name: getattr(args, name) for name in AS_THEY_ARE},
    }
    if args.test is not None and args.task is None:
        raise ConfigError(
            "--test: the task 'digits' has its own test data. Give --task csv:FILE or "
            "image-folder:DIR."
        )
    chosen = {key: value for key, value in given.items() if value is not None}
    request = default_request(resume=args.resume, retry=args.retry, **chosen)
    if args.head_lr is not None and all(entry.method == "Head" for entry in request.entries):
        raise ConfigError(
            "--head-lr: where the head alone is trained, its rate is the method's: --lr head=RATE."
        )
    if args.head_lr is not None and isinstance(request.task, GenerationRef):
        raise ConfigError(
            f"--head-lr: the task {request.task.name!r} has text for an answer and no new head."
        )
    from dataclasses import replace

    return replace(request, entries=entries.with_lrs(request.entries, args.lr))


def _read(reader: Callable[[str], Any], text: str | None) -> Any:
    return reader(text) if text is not None else None


def _check_json(path: Path | None) -> None:
    from ..errors import ConfigError

    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise ConfigError(
            f"--json {str(path)!r}: "
            + (
                "this is a directory; give a file."
                if path.is_dir()
                else f"there is no directory {str(path.parent)!r}."
            )
        )


def _printed(name: str | None, request: Request) -> Printed | None:
    from ..compare.like import find_like

    return find_like(name, request.task.name) if name is not None else None


def _write(
    found: Comparison, request: Request, args: argparse.Namespace, printed: Printed | None
) -> None:
    from ..compare import like, output, report
    from ..compare.locks import file_lock
    from ..compare.place import LOCK
    from ..compare.store import write_atomically

    print(output.text(found, like.lay(found, printed) if printed is not None else None))
    if args.json is not None:
        write_atomically(args.json, report.dumps(found))
    with file_lock(request.out, LOCK):  # other processes of the same --out write their reports too
        written = output.write(
            found, request.out, shlex.join(["weft", *_without_password(args.words)]), printed
        )
    print("\n" + report.wrap(f"In {request.out}/: {', '.join([*written, 'adapters/'])}"))


def _without_password(words: list[str]) -> list[str]:
    """The command as the report may show it to everybody."""
    return [re.sub(r"(://[^:/@]*):[^@/]*@", r"\1:***@", word) for word in words]


def _interrupted(request: Request, words: list[str]) -> int:
    from ..compare.store import is_there, kept

    there = is_there(request.place)
    finished = kept(request.place) if there else 0
    command = shlex.join(["weft", *words, *(["--resume"] if there and not request.resume else [])])
    print(
        f"\nInterrupted. {finished} finished runs are kept in "
        f"{request.place if request.study else request.out}. "
        f"Go on with:\n  {command}",
        file=sys.stderr,
    )
    return 130


def _list(args: argparse.Namespace) -> int:
    from ..errors import ConfigError

    others = {key: value for key, value in vars(args).items() if key not in ("list", "words")}
    if any(value not in (None, False, []) for value in others.values()):
        raise ConfigError("--list stands alone: it prints names and compares nothing.")
    from ..compare import entries, like
    from ..methods import METHODS
    from ..tasks import FAMILIES, GENERATION
    from ..tasks.models import EMBEDDED
    from ..tasks.packaged import PACKAGED
    from . import listed

    methods = {entry.label: entry for entry in entries.parse_methods(",".join(METHODS))}
    print("methods (--methods lora,vera:r=64)", *entries.as_table(methods), "", sep="\n")
    print(
        "tasks (--task)", *(listed(name, what, 21) for name, what in FAMILIES.items()), "", sep="\n"
    )
    print(
        "tasks whose answers are text (--task; a causal language model)",
        *(listed(name, what, 21) for name, what in GENERATION.items()),
        "",
        sep="\n",
    )
    packaged = (
        f"{held.what}; " + ("installed" if held.place() else held.install)
        for held in PACKAGED.values()
    )
    print(
        "models (--model)",
        *(listed(name, "embedded", 21) for name in EMBEDDED),
        *(listed(name, what, 21) for name, what in zip(PACKAGED, packaged, strict=True)),
        "  a directory that transformers can read",
        "  a name on the hub, such as google/vit-base-patch16-224",
        sep="\n",
    )
    print(
        "\nprinted tables (--like)",
        *(listed(name, held.title, 27) for name, held in like.tables().items()),
        sep="\n",
    )
    return 0


def _whole(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, 1 or more")
    return int(text)


def _share(text: str) -> float:
    value = _number(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} must be a number from 0 to below 1, for example 0.1"
        )
    return value


def _decay(text: str) -> float:
    value = _number(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(
            f"{text!r} must be 0 or a number above it, for example 0.01"
        )
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def _rate(text: str) -> float:
    value = _number(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} must be a number above 0, for example 1e-2")
    return value
