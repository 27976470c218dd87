"""`weft inspect`: describes and checks an adapter's directory."""

from __future__ import annotations

import argparse

from .common import ADAPTER, add_json_option, write_json

HELP = "describe an adapter's directory, with every tensor checked"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", metavar="DIR", help=ADAPTER)
    add_json_option(parser, "also write the description to this file")


def run(args: argparse.Namespace) -> int:
    from ..checkpoint import inspect

    found = inspect(args.directory)
    print(found)
    write_json(args.json, found.to_json())
    return 0
