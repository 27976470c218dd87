"""`weft merge`: writes a plain transformers model with the adapter in its weights."""

from __future__ import annotations

import argparse
import shutil
import textwrap
from pathlib import Path
from typing import Any

from ..tasks.quantize import DTYPES
from ..untrusted.printable import WIDTH
from .common import ADAPTER, add_model_option, add_other_base

HELP = "write a plain transformers model with an adapter merged into its weights"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_model_option(parser)
    add("--adapter", required=True, metavar="DIR", help=ADAPTER)
    add_other_base(parser)
    add(
        "--out",
        required=True,
        metavar="DIR",
        type=Path,
        help="a new directory for the merged model",
    )
    add(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="of the merged weights (default: as the base has them)",
    )
    add("--no-verify", action="store_true", help="do not compare outputs before and after")
    add(
        "--tolerance",
        type=float,
        metavar="X",
        help="largest relative change of the outputs (default: by dtype)",
    )


def run(args: argparse.Namespace) -> int:
    """Merges an adapter into a copy of its model. Returns 0. Raises ConfigError if --out is not
    empty or --tolerance is given with --no-verify.
    """
    from ..checkpoint.directories import is_taken
    from ..checkpoint.load import load, read
    from ..checkpoint.tokenizer_files import has_tokenizer
    from ..errors import ConfigError
    from ..inference.opened import missing_tokenizer, set_padding
    from ..inference.pretrained import base_for, dummy_inputs, find_source, is_classifier
    from ..model.detach import detach
    from ..model.merge import merge

    if is_taken(args.out):
        raise ConfigError(f"--out {str(args.out)!r} exists and is not empty; give a new directory.")
    if args.no_verify and args.tolerance is not None:
        raise ConfigError("--tolerance has no meaning with --no-verify.")
    ref = find_source(args.model)
    checkpoint = read(args.adapter)
    model: Any = base_for(
        ref,
        checkpoint.base.get("class"),
        checkpoint.selected,
        args.dtype,
        checkpoint.words,
        checkpoint.new_rows,
    )[0]
    adapter = load(model, args.adapter, other_base=args.other_base)
    if is_classifier(model):
        set_padding(model, ref, args.adapter)
    new = next(iter(checkpoint.token_ids.values()), ())
    report = merge(
        model, verify=None if args.no_verify else dummy_inputs(model, new), tolerance=args.tolerance
    )
    detach(model, keep_merged=True)
    _write_model(model, args.out, Path(ref.source), args.adapter)
    print(textwrap.fill(str(report), WIDTH))
    lost = missing_tokenizer(args.adapter) if has_tokenizer(Path(ref.source)) else None
    for note in (*adapter.load_report.notes, *(() if lost is None else (lost,))):
        print(textwrap.fill(f"note: {note}", WIDTH))
    print(f"{args.out}:\n{type(model).__name__}, loads with {type(model).__name__}.from_pretrained")
    return 0


def _write_model(model: Any, out: Path, source: Path, adapter: str) -> None:
    """Writes the directory under a temporary name and renames it, so that it is whole or absent.
    The tokenizer is the adapter's, if that has one.
    """
    from ..checkpoint.directories import new_directory
    from ..checkpoint.tokenizer_files import MORE_TEMPLATES, NAMES, copy_tokenizer
    from ..errors import CheckpointError

    try:
        with new_directory(out) as temporary:
            model.save_pretrained(temporary)
            left = NAMES if copy_tokenizer(adapter, temporary) else ()
            for file in source.iterdir() if source.is_dir() else ():
                if (temporary / file.name).exists() or file.name in left:
                    continue
                if file.is_file() and _belongs(file):
                    shutil.copy(file, temporary / file.name)
                elif file.name == MORE_TEMPLATES and not left:
                    shutil.copytree(file, temporary / file.name)
    except OSError as error:
        raise CheckpointError(f"--out {str(out)!r} could not be written ({error}).") from error


def _belongs(file: Path) -> bool:
    """Tokenizer, processor and generation files are copied; weights and read-mes are not."""
    return file.suffix in (".json", ".txt", ".model", ".jinja") and "safetensors" not in file.name
