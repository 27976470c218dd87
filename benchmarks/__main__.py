"""The command line; see the package's docstring."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from . import cases, gpu, report, store
from .case import KINDS, Case, select
from .kinds.deep import clear
from .timing import Rounds, threads

RESULTS = Path(__file__).resolve().parent / "results"
SETS = {"quick": cases.QUICK, "full": cases.FULL}
MINUTES = {"quick": 20.0, "full": 250.0, "gpu": 14.0}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=(__import__("benchmarks").__doc__ or ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = made.add_subparsers(dest="command", required=True)
    for name, minutes in MINUTES.items():
        add = commands.add_parser(name).add_argument
        add(
            "--cases",
            metavar="NAME,NAME",
            help="only these (`python -m benchmarks list` names them)",
        )
        add(
            "--budget-minutes",
            type=float,
            default=minutes,
            help=f"for the whole set (default: {minutes:g})",
        )
        add(
            "--least",
            type=int,
            help="fewest rounds of every case (default: the case's own, 3 to 21)",
        )
        add(
            "--threads",
            type=int,
            default=torch.get_num_threads(),
            help="default: torch's own choice",
        )
        add("--out", type=Path, default=RESULTS / f"{name}.json", metavar="FILE")
        add("--resume", action="store_true", help="keep the cases that FILE has already")
        if name == "gpu":
            add("--device", choices=("cuda", "cpu"), default="cuda")
            add("--tiny", action="store_true", help="small shapes: does the script run?")
    commands.add_parser("list", help="the cases of both sets")
    shown = commands.add_parser("table", help="print a results file again").add_argument
    shown("file", type=Path)
    shown("--readme", action="store_true", help="the short form, in Markdown")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Returns 0 if everything was measured, 1 if a case failed, 2 for bad arguments."""
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parser().parse_args(arguments)
    try:
        if args.command == "list":
            print(
                "\n".join(
                    f"{case.name:20} {case.kind:9} {', '.join(case.contenders)}"
                    for case in cases.FULL
                )
            )
            return 0
        if args.command == "table":
            data = store.read(args.file)
            print(report.short_form(data) if args.readme else report.table(data))
            return 0
        return run(args, f"python -m benchmarks {shlex.join(arguments)}")
    except (ValueError, OSError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2


def run(args: argparse.Namespace, command: str) -> int:
    everything = gpu.cases(args.device, args.tiny) if args.command == "gpu" else SETS[args.command]
    selected = select(everything, args.cases)
    if args.budget_minutes <= 0 or args.threads < 1 or (args.least is not None and args.least < 1):
        raise ValueError("--budget-minutes must be above 0, --threads and --least 1 or more.")
    torch.set_num_threads(args.threads)
    _quiet()
    data = store.resume(args.out, command) if args.resume else store.fresh(command)
    print(report.where(data), flush=True)
    unit = 60 * args.budget_minutes / sum(case.weight for case in everything)
    failed = []
    for case in selected:
        if args.resume and store.finished(data, case):
            print(f"{case.name}: in the file already", flush=True)
            continue
        try:
            made = measure(case, case.weight * unit, args.least)
        # the other cases are worth having; table, file and status say that one is missing
        except Exception as error:
            failed.append(case.name)
            print(f"{case.name} FAILED\n{traceback.format_exc()}", file=sys.stderr, flush=True)
            made = store.entry(case, {"samples": {}}, 0.0, f"{type(error).__name__}: {error}")
        store.put(data, made)
        store.write(args.out, data)
        print(f"{case.name}: {made['rounds']} rounds in {made['seconds']:.0f} s", flush=True)
    print("\n" + report.table(data) + f"\n\nwritten to {args.out}")
    if failed:
        print(f"\nfailed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def measure(case: Case, seconds: float, least: int | None = None) -> dict[str, Any]:
    """Measures one case and returns its entry in the results file."""
    started = time.perf_counter()
    wanted = case.least if least is None else least
    rounds = Rounds.within(seconds, least=wanted, most=max(51, wanted))
    with threads(case.setup.threads):
        measured = KINDS[case.kind](case.setup, case.contenders, rounds)
    clear(case.setup.device)
    return store.entry(case, measured, time.perf_counter() - started)


def _quiet() -> None:
    """transformers tells of every random model; what goes wrong still raises."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
