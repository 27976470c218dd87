"""`weft plan`: the layers a method would train, its bytes and memory; no weights needed."""

from __future__ import annotations

import argparse
import textwrap
from typing import Any

from ..tasks.quantize import DTYPES, QUANTIZE
from .common import add_json_option, add_model_option, settings, write_json

HELP = "what a method would train in a model: layers, numbers, bytes, memory; no weights needed"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_model_option(
        parser,
        "a config.json or a directory with one, a name of weft compare --list, or a hub name",
    )
    add("--method", required=True, metavar="NAME", help="for example dora")
    add("--r", type=int, help="rank")
    add("--alpha", type=float, help="scale of the update: alpha / r")
    add(
        "--targets",
        metavar="T,T",
        help="all-linear (default), attention, mlp, name endings, or a regular expression",
    )
    add(
        "--set",
        metavar="FIELD=VALUE",
        action="append",
        default=[],
        help="any other field of the method",
    )
    add(
        "--dtype",
        choices=[name for name in DTYPES if name != "auto"],
        default="bfloat16",
        help="of the base's weights, for the estimate (default: bfloat16)",
    )
    add(
        "--quantize",
        choices=tuple(QUANTIZE),
        help="count the base's weights as quantised so (default: as its own files are)",
    )
    add(
        "--batch",
        type=int,
        metavar="N",
        help="with --tokens: count the activations of a batch of N rows too",
    )
    add("--tokens", type=int, metavar="N", help="tokens per row")
    add_json_option(parser, "write the plan there too")


def run(args: argparse.Namespace) -> int:
    """Prints the tensors that an adapter would train. Returns 0. Raises ConfigError if --batch and
    --tokens are not given together.
    """
    from ..errors import ConfigError

    config = _method_config(args)
    if (
        (args.batch is None) != (args.tokens is None)
        or (args.batch or 1) < 1
        or (args.tokens or 1) < 1
    ):
        raise ConfigError("--batch and --tokens are given together, each 1 or more.")
    import torch

    from ..inference.pretrained import empty_model, find_source
    from ..model.attach import attach_noted
    from ..model.memory import estimate
    from ..model.plan import size_text
    from ..untrusted.printable import WIDTH

    ref = find_source(args.model)
    model = empty_model(ref).to(getattr(torch, args.dtype))
    quantize, odd = _quantised(args.quantize, model)
    packed = _packed(quantize, model, getattr(torch, args.dtype)) if quantize else {}
    adapter = attach_noted(model, config)
    plan = adapter.plan()
    memory = estimate(adapter, _inputs(model, args), packed)
    print(f"{type(model).__name__} from {args.model}")
    print(plan)
    for note in [*odd, *adapter.notes]:
        print(textwrap.fill(f"note: {note}", WIDTH))
    print(f"file: {size_text(adapter.nbytes)}")
    print(_memory_text(memory, args, size_text, quantize))
    write_json(
        args.json,
        {
            "schema": 1,
            "model": args.model,
            **plan.to_json(),
            "file_bytes": adapter.nbytes,
            "memory": {
                **vars(memory),
                "total": memory.total,
                "dtype": args.dtype,
                "quantize": quantize,
                "optimiser_kind": "AdamW",
            },
        },
    )
    return 0


def _method_config(args: argparse.Namespace) -> Any:
    """The method's configuration from the options. Raises ConfigError for an unknown method or
    field.
    """
    from .. import methods

    fields: dict[str, Any] = {
        name: value for name in ("r", "alpha") if (value := getattr(args, name)) is not None
    }
    if args.targets is not None:
        fields["targets"] = targets_of(args.targets)
    fields = settings(args.set, fields)
    return methods.from_json({"method": methods.by_name(args.method).__name__, **fields})


def targets_of(text: str) -> Any:
    """Returns `q_proj,v_proj` as a list, and a single pattern unchanged."""
    from ..methods.target_spec import is_ending

    parts = text.split(",")
    if len(parts) > 1 and all(is_ending(part) for part in parts):
        return parts
    return [text] if is_ending(text) else text


def _inputs(model: Any, args: argparse.Namespace) -> Any:
    if args.batch is None:
        return None
    import torch

    from ..errors import ConfigError

    if getattr(model, "main_input_name", "") != "input_ids":
        raise ConfigError(f"--tokens: {type(model).__name__} does not read tokens.")
    ids = torch.zeros(args.batch, args.tokens, dtype=torch.int64, device="meta")
    return {
        "input_ids": ids,
        **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}),
    }


def _quantised(asked: str | None, model: Any) -> tuple[str | None, list[str]]:
    """The name of the kind of quantisation, asked for or of the model's own files; and what of it
    is not counted.
    """
    from ..tasks.quantize import kind_of_files

    own = getattr(getattr(model, "config", None), "quantization_config", None)
    if own is None or asked is not None:
        return asked, []
    return kind_of_files(own)


def _packed(name: str, model: Any, dtype: Any) -> dict[str, Any]:
    from torch import nn

    from ..model.memory import PackedSize
    from ..tasks.quantize import packed_layers, packed_size

    found = {}
    for layer, module in packed_layers(name, model).items():
        out, in_ = (
            module.weight.shape if isinstance(module, nn.Linear) else module.weight.shape[::-1]
        )
        codes, scales = packed_size(name, int(out), int(in_))
        width = 4 if name == "int8" else dtype.itemsize  # LLM.int8()'s scales are float32
        found[layer] = PackedSize(codes, scales, out * in_ * width)
    return found


def _memory_text(memory: Any, args: argparse.Namespace, size: Any, quantize: str | None) -> str:
    parts = [
        ("base weights", memory.base, quantize or args.dtype),
        *(
            [
                (" codes", memory.codes, ""),
                (" scales", memory.scales, ""),
                (
                    " one unpacked",
                    memory.unpacked,
                    f"the largest layer, for a moment, {args.dtype}",
                ),
            ]
            if quantize
            else []
        ),
        ("adapter", memory.trained, "with shared matrices"),
        ("gradients", memory.gradients, ""),
        ("AdamW state", memory.optimiser, "two moments"),
    ]
    if memory.activations is not None:
        parts.append(
            (
                "activations",
                memory.activations,
                f"{args.batch} x {args.tokens} tokens, no checkpointing",
            )
        )
    parts.append(
        (
            "total",
            memory.total,
            "and temporaries"
            if memory.activations is not None
            else "and activations, which --batch and --tokens count",
        )
    )
    lines = ["memory of a training step:"]
    lines += [f"  {name:<13}{size(value):>11}  {note}".rstrip() for name, value, note in parts]
    return "\n".join(lines)
