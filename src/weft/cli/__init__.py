"""The command `weft`: one thin file per command. A command's `run` imports libraries, its help does
not.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import textwrap
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from .. import __version__
from ..errors import ConfigError, WeftError
from ..untrusted.printable import WIDTH, printable

COMMANDS = (
    "compare",
    "train",
    "eval",
    "generate",
    "plan",
    "papers",
    "inspect",
    "merge",
    "export",
    "score",
    "judge",
    "analyze",
    "doctor",
)
DONE, FAILED, MISUSED, INTERRUPTED, CLOSED = 0, 1, 2, 130, 141
# Top-level modules and the extra that installs them. Any other missing module is a bug and keeps its
# traceback.
EXTRAS = {
    **dict.fromkeys(
        (
            "PIL",
            "accelerate",
            "datasets",
            "filelock",
            "matplotlib",
            "numpy",
            "optuna",
            "psutil",
            "pyarrow",
            "scipy",
            "sklearn",
            "sqlalchemy",
            "statsmodels",
            "tqdm",
            "transformers",
            "yaml",
        ),
        "train",
    ),
    **dict.fromkeys(("nltk", "pycocoevalcap", "rouge_score", "sacrebleu"), "tasks"),
    "lm_eval": "lm-eval",
    "psycopg": "postgres",
}


class Parser(argparse.ArgumentParser):
    """A parser whose errors take one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(MISUSED, f"{self.prog}: {printable(' '.join(message.split()))}\n")


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit status: 0 done, 1 failed, 2 bad arguments, 130
    interrupted.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(words)
    except SystemExit as leaving:  # argparse leaves this way, after --help as after an error
        return leaving.code if isinstance(leaving.code, int) else MISUSED


def _dispatch(words: list[str]) -> int:
    if not words or words[0] not in COMMANDS:
        return _top(words)
    name = words[0]
    command = importlib.import_module(f"{__name__}.{name}")
    parser = Parser(prog=f"weft {name}", description=command.HELP, allow_abbrev=False)
    command.add_arguments(parser)
    args, rest = parser.parse_known_args(words[1:])
    if rest:
        parser.error(_unknown(rest, list(parser._option_string_actions)))
    args.words = words
    return _run_command(command, args, f"weft {name}")


def _top(words: Sequence[str]) -> int:
    """Handles `weft --help`, `weft --version`, and everything that is not a command."""
    parser = Parser(
        prog="weft",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="weft COMMAND [options]",
        description=_commands() if _asks_help(words) else None,
    )
    parser.add_argument("--version", action="version", version=f"weft {__version__}")
    rest = parser.parse_known_args(list(words))[1]
    if not rest:
        parser.error(f"give a command: {', '.join(COMMANDS)}. See weft --help.")
    if rest[0].startswith("-"):
        parser.error(_unknown(rest, list(parser._option_string_actions)))
    near = get_close_matches(rest[0], COMMANDS, n=2) or list(COMMANDS)
    parser.error(f"{rest[0]!r} is not a command. Nearest: {', '.join(near)}.")


def _asks_help(words: Sequence[str]) -> bool:
    return any(word in ("-h", "--help") for word in words)


def _commands() -> str:
    texts = {name: importlib.import_module(f"{__name__}.{name}").HELP for name in COMMANDS}
    lines = [listed(name, text, 11) for name, text in texts.items()]
    return "\n".join(
        [
            "Parameter-efficient fine-tuning with the LoRA family.",
            "",
            "commands:",
            *lines,
            "",
            "See weft COMMAND --help.",
        ]
    )


def listed(name: str, text: str, column: int) -> str:
    """Returns a name and its text at 80 columns. Words with hyphens are not split, since they may
    be typed.
    """
    start = f"  {name}".ljust(column - 1) + " "
    return textwrap.fill(
        text, WIDTH, initial_indent=start, subsequent_indent=" " * column, break_on_hyphens=False
    )


def _unknown(rest: Sequence[str], options: Sequence[str]) -> str:
    first = rest[0].partition("=")[0]
    if not first.startswith("-"):
        return f"{first!r} belongs to no option."
    near = get_close_matches(first, options, n=2, cutoff=0.5)
    known = f"Nearest: {', '.join(near)}." if near else f"Options: {', '.join(options)}."
    return f"{first!r} is not known here. {known}"


def _run_command(command: Any, args: argparse.Namespace, prog: str) -> int:
    try:
        status = int(command.run(args))
        sys.stdout.flush()
        return status
    except ConfigError as error:
        return _print_error(prog, str(error), MISUSED)
    except WeftError as error:
        return _print_error(prog, str(error), FAILED)
    except ImportError as error:
        module = (error.name or "").partition(".")[0]
        if module not in EXTRAS:
            raise
        return _print_error(
            prog,
            f"{module} is needed but not installed: pip install 'weft[{EXTRAS[module]}]'",
            FAILED,
        )
    except BrokenPipeError:
        # `weft ... | head`: the reader has closed. Nothing may be written at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED
    except OSError as error:
        return _print_error(prog, str(error), FAILED)
    except KeyboardInterrupt:
        return _print_error(prog, "interrupted.", INTERRUPTED)


def _print_error(prog: str, message: str, status: int) -> int:
    # What came from a file or a server must not steer the terminal.
    print(f"{prog}: {printable(message)}", file=sys.stderr)
    return status
