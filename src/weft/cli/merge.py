"""`weft merge`: writes a plain transformers model with the adapter in its weights."""

from __future__ import annotations

import argparse
import shutil
import textwrap
from pathlib import Path
from typing import Any

from ..tasks.quantize import DTYPES, QUANTIZE
from ..untrusted.printable import WIDTH
from .common import ADAPTER, add_model_option, add_other_base

HELP = "write a plain transformers model with an adapter merged into its weights"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_model_option(parser)
    add("--adapter", required=True, metavar="DIR", help=ADAPTER)
    add_other_base(parser)
    add(
        "--quantize",
        choices=tuple(QUANTIZE),
        help="merge over the base quantised so (default: as the run of --adapter had it)",
    )
    add(
        "--onto",
        metavar="MODEL",
        help="merge onto this model's weights, before they were quantised, instead of --model's",
    )
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
        help="of the merged weights (default: as the base has them; of the dense ones over a quantised base)",
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
    empty, --tolerance is given with --no-verify, or it is open whether the quantised weights are
    meant.
    """
    from ..checkpoint.directories import is_taken
    from ..checkpoint.load import load, read
    from ..checkpoint.tokenizer_files import has_tokenizer
    from ..errors import ConfigError
    from ..inference.opened import missing_tokenizer, set_padding
    from ..inference.pretrained import base_for, find_source, is_classifier
    from ..inference.trial_inputs import trial_inputs
    from ..model.detach import detach
    from ..model.merge import merge
    from ..model.packed_merge import cast_beside, dequantise

    if is_taken(args.out):
        raise ConfigError(f"--out {str(args.out)!r} exists and is not empty; give a new directory.")
    if args.no_verify and args.tolerance is not None:
        raise ConfigError("--tolerance has no meaning with --no-verify.")
    checkpoint = read(args.adapter)
    quantize, dtype = _quantised(args, checkpoint.packed)
    ref = find_source(args.onto or args.model)
    model: Any = base_for(
        ref,
        checkpoint.base.get("class"),
        checkpoint.selected,
        dtype,
        checkpoint.words,
        checkpoint.new_rows,
        quantize=quantize,
    )[0]
    if args.dtype not in ("auto", dtype):
        cast_beside(model, args.dtype)
    adapter = load(model, args.adapter, other_base=args.other_base)
    if is_classifier(model):
        set_padding(model, ref, args.adapter)
    new = next(iter(checkpoint.token_ids.values()), ())
    report = merge(
        model,
        verify=None if args.no_verify else trial_inputs(model, ref, args.adapter, new),
        tolerance=args.tolerance,
    )
    detach(model, keep_merged=True)
    rest = dequantise(model, None)
    _write_model(model, args.out, Path(ref.source), args.adapter)
    print(textwrap.fill(str(report), WIDTH))
    lost = missing_tokenizer(args.adapter) if has_tokenizer(Path(ref.source)) else None
    notes = [*adapter.load_report.notes, *_notes(args, quantize, rest)]
    for note in (*notes, *(() if lost is None else (lost,))):
        print(textwrap.fill(f"note: {note}", WIDTH))
    print(f"{args.out}:\n{type(model).__name__}, loads with {type(model).__name__}.from_pretrained")
    return 0


def _quantised(args: argparse.Namespace, packed: tuple[str, ...]) -> tuple[str | None, str]:
    """Returns how to quantise the base while it loads, and the dtype that it is loaded in.

    Raises ConfigError if the adapter was trained over quantised weights and nothing says which.
    """
    from ..checkpoint.files import run_of
    from ..errors import ConfigError
    from ..tasks.quantize import check_package
    from ..training.run_dir import RunDir

    run = run_of(args.adapter)
    section = {} if run is None else RunDir(run).read()["config"].get("model", {})
    trained = section.get("quantize")
    if args.onto is not None:
        if args.quantize is not None:
            raise ConfigError("--onto means weights that are not quantised; leave out --quantize.")
        if run is not None and trained is None and not packed:
            raise ConfigError(
                "--onto is for an adapter that was trained over quantised weights, and this one was not. Leave it out."
            )
        return None, args.dtype
    quantize = args.quantize or trained
    if quantize is not None:
        check_package(quantize, "--quantize")
        return quantize, section.get("dtype", "auto") if quantize == trained else "auto"
    if packed and not _is_packed(args.model):
        name = packed[0].lower() if packed[0].lower() in QUANTIZE else "NAME"
        raise ConfigError(
            f"--adapter {args.adapter!r} was trained over weights quantised as {', '.join(packed)}. Say "
            f"which weights it is merged into: those, with --quantize {name}, or those from before, with "
            f"--onto {args.model}."
        )
    return None, args.dtype


def _is_packed(model: str) -> bool:
    """Whether a model's own files are quantised."""
    from ..inference.pretrained import configuration, find_source

    return getattr(configuration(find_source(model)), "quantization_config", None) is not None


def _notes(args: argparse.Namespace, quantize: str | None, rest: list[str]) -> list[str]:
    found = []
    if quantize is not None and args.quantize is None:
        found.append(f"the base was quantised as in the adapter's run: {quantize}")
    if rest:
        found.append(f"the other packed layers ({', '.join(rest)}) were made dense, too")
    return found


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
