"""`weft export`: writes an adapter in another form and measures the error of the conversion."""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

from ..untrusted.printable import WIDTH
from .common import ADAPTER

HELP = "write an adapter in another form (plain LoRA, or what peft reads), with the measured error"
FORMS = ("lora", "peft")  # those of checkpoint/conversions.py, without importing torch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--adapter", required=True, metavar="DIR", help=ADAPTER)
    add("--to", required=True, choices=FORMS, help="lora: plain LoRA; peft: a form that peft reads")
    add("--out", required=True, metavar="DIR", type=Path, help="a new directory for the result")


def run(args: argparse.Namespace) -> int:
    from ..checkpoint import export

    found = export(args.adapter, args.to, args.out)
    print(
        "\n".join(
            textwrap.fill(line, WIDTH, break_on_hyphens=False) for line in str(found).splitlines()
        )
    )
    print(f"{args.out}:\nreadable by weft.load and by PeftModel.from_pretrained")
    return 0
