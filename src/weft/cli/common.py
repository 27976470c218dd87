"""Shared by several commands: options, values of options, and files that they write."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..tasks.quantize import DEVICES, DTYPES, QUANTIZE

BASE = "a name of weft compare --list, a directory, or a hub name"
ADAPTER = "a directory that weft.save, weft train or peft's save_pretrained wrote"


def add_model_option(
    parser: argparse.ArgumentParser, about: str = f"the base: {BASE}", required: bool = True
) -> None:
    """Adds --model."""
    parser.add_argument("--model", required=required, metavar="M", help=about)


def add_adapter_option(parser: argparse.ArgumentParser) -> None:
    """Adds --adapter."""
    parser.add_argument(
        "--adapter",
        metavar="DIR",
        help="an adapter of weft train, weft.save or peft (default: the base alone)",
    )
    add_other_base(parser)


def add_other_base(parser: argparse.ArgumentParser) -> None:
    """Adds --other-base."""
    parser.add_argument(
        "--other-base",
        action="store_true",
        help="use the adapter on a base with other weights than its own",
    )


def add_device_options(parser: argparse.ArgumentParser, default: str | None = "auto") -> None:
    """Adds --dtype and --device."""
    add = parser.add_argument
    add("--dtype", choices=DTYPES, default=default, help="of the base's weights")
    add("--quantize", choices=tuple(QUANTIZE), help="quantise the base's weights while they load")
    add("--device", choices=DEVICES, default=default, help="auto (default): CUDA if available")


def add_json_option(parser: argparse.ArgumentParser, about: str) -> None:
    """Adds --json."""
    parser.add_argument("--json", metavar="FILE", type=output_file, help=about)


def output_file(text: str) -> Path:
    """Returns the path of a file to write when the work is done.

    Raises ArgumentTypeError now, before it, if a file cannot be written there.
    """
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a directory; give a file")
    if path.exists() and not path.is_file():  # a device, a FIFO, the standard output
        return path
    parent = Path(os.path.realpath(path)).parent
    if not parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r}: there is no directory {str(parent)!r}")
    try:
        tempfile.TemporaryFile(dir=parent).close()
    except OSError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r}: no file can be written in {str(parent)!r} ({error.strerror})"
        ) from None
    return path


def print_notes(notes: Iterable[str]) -> None:
    """Prints what loading an adapter noted, on standard error."""
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def setting(text: str) -> tuple[str, Any]:
    """Splits `field=value`. The value is that of `field_types.literal`. Raises ConfigError."""
    from ..errors import ConfigError
    from ..methods.field_types import literal

    name, equals, value = text.partition("=")
    if not equals or not name or not value:
        raise ConfigError(f"--set {text!r}: write FIELD=VALUE, for example --set dropout=0.05.")
    return name, literal(value)


def settings(texts: Iterable[str], given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Returns the values of `field=value` texts, beside those of other options in `given`. Raises
    ConfigError if a field is given twice.
    """
    from ..errors import ConfigError

    found = dict(given or {})
    for text in texts:
        name, value = setting(text)
        if name in found:
            raise ConfigError(f"--set {text!r}: {name} is given twice.")
        found[name] = value
    return found


def write_json(file: Path | None, data: Mapping[str, Any]) -> None:
    """Writes the data as JSON, whole or not at all; nothing if `file` is None."""
    if file is not None:
        write_text(file, json.dumps(data, indent=1) + "\n")


def write_text(file: Path, text: str) -> None:
    """Writes a text file, whole or not at all."""
    from ..checkpoint.files import replace

    replace(file, lambda path: path.write_text(text, encoding="utf-8"))


def scores_text(report: Any) -> str:
    """Returns one line per metric, with the reason if it could not run, and the notes."""
    width = max(len(name) for name in report.scores)
    lines = [
        f"{name:<{width}}  "
        + (f"{value:.4f}" if value is not None else f"missing: {report.reasons[name]}")
        for name, value in report.scores.items()
    ]
    return "\n".join([*lines, *report.notes])
