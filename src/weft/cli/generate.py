"""`weft generate`: text from a model, with or without an adapter."""

from __future__ import annotations

import argparse

from .common import add_adapter_option, add_device_options, add_model_option, print_notes, settings

HELP = "continue a prompt with a model, with or without an adapter"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_model_option(parser)
    add_adapter_option(parser)
    add(
        "--prompt",
        required=True,
        action="append",
        metavar="TEXT",
        help="the prompt to continue; may be given again",
    )
    add(
        "--chat",
        action="store_true",
        help="the prompt is a user's message for the tokenizer's chat template",
    )
    add(
        "--image",
        action="append",
        default=[],
        metavar="FILE",
        help="with --chat: a picture before the text of every prompt, for a vision-language model; "
        "may be given again",
    )
    add("--max-new-tokens", type=int, default=128, metavar="N", help="default: 128")
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="another setting of model.generate, for example num_beams=4, or do_sample=True",
    )
    add("--seed", type=int, default=0, metavar="N", help="for do_sample=True (default: 0)")
    add_device_options(parser)


def run(args: argparse.Namespace) -> int:
    """Generates text. Returns 0. Raises ConfigError if --max-new-tokens is not positive, or --image
    is given without --chat.
    """
    import torch

    from ..encoding.image_files import check_image
    from ..errors import ConfigError
    from ..inference.generate import generate
    from ..inference.opened import open_model

    if args.max_new_tokens < 1:
        raise ConfigError("--max-new-tokens is a whole number, 1 or more.")
    if args.image and not args.chat:
        raise ConfigError(
            "--image needs --chat: the chat template says where a picture is in the prompt."
        )
    for name in args.image:
        check_image(name, "--image")
    chosen = {"max_new_tokens": args.max_new_tokens, **settings(args.set)}
    opened = open_model(
        args.model,
        args.adapter,
        args.dtype,
        args.device,
        None,
        args.other_base,
        args.quantize,
        images=bool(args.image),
    )
    print_notes(opened.notes)
    torch.manual_seed(args.seed)
    for text in generate(opened, args.prompt, chosen, args.chat, images=args.image):
        print(text)
    return 0
