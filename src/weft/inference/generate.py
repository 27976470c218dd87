"""Text from a causal language model, for prompts that are tokenized as in training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import torch

from ..encoding.borders import plain_ids
from ..encoding.image_batch import prompt_inputs
from ..encoding.image_files import check_image, open_image
from ..encoding.image_render import ImageRenderer
from ..encoding.render import Renderer
from ..errors import ConfigError, WeftError
from ..model.statistics import in_eval
from ..tasks.vocabulary import check_ids, max_positions, padding
from .opened import Opened, check_generates

TEXTS = (  # settings of model.generate whose values may be text
    "cache_implementation",
    "dola_layers",
    "early_stopping",
    "num_assistant_tokens_schedule",
    "speculation_type",
    "stop_strings",
)


def generate(
    opened: Opened,
    prompts: Sequence[str],
    settings: dict[str, Any],
    chat: bool,
    batch: int = 8,
    images: Sequence[str] = (),
) -> list[str]:
    """Returns the continuation of each prompt. With `chat` a prompt is a user's message for the
    tokenizer's chat template. The pictures in the files `images` stand before every prompt.

    settings: keyword arguments of `model.generate`. Raises ConfigError for an unknown one,
    WeftError if the model generates no text or a prompt does not fit.
    """
    check_settings(settings)
    check_generates(opened.model)
    renderer = opened.renderer
    if opened.processor is not None and (chat or images):
        return answer_images(opened, prompts, images, settings)
    if chat:
        prompts = [
            renderer.chat_prompt([{"role": "user", "content": prompt}]) for prompt in prompts
        ]
        renderer = renderer.bare()
    return answer(opened.model, renderer, prompts, settings, batch)


@torch.no_grad()
def answer_images(
    opened: Opened, prompts: Sequence[str], images: Sequence[str], settings: Mapping[str, Any]
) -> list[str]:
    """Returns the answer to each prompt, a user's message after the pictures in the files `images`,
    one at a time. Raises WeftError if a picture cannot be read or a prompt does not fit.
    """
    processor, renderer, model = opened.processor, opened.renderer, opened.model
    if processor is None or not isinstance(renderer, ImageRenderer):
        raise ConfigError("images need the processor of a vision-language model.")
    sizes = [check_image(name, "--image").size for name in images]
    pictures = [open_image(name, "--image") for name in images]
    coded = [
        renderer.started(plain_ids(opened.tokenizer, renderer.picture_prompt(prompt, sizes)))
        for prompt in prompts
    ]
    check_fits(model, coded, settings)
    check_ids(coded, opened.tokenizer, model.config, "prompt")
    keywords, texts = _keywords(opened.tokenizer, renderer, model, settings), []
    with in_eval(model):
        for ids in coded:
            inputs = prompt_inputs(processor, ids, pictures, model.device)
            inputs = {
                key: value.to(model.dtype) if value.is_floating_point() else value
                for key, value in inputs.items()
            }
            _check_beams(inputs, len(pictures), settings)
            out = model.generate(**inputs, **keywords)
            texts.append(_decoded(opened.tokenizer, out[0, len(ids) :]))
    return texts


def _check_beams(inputs: Mapping[str, Any], images: int, settings: Mapping[str, Any]) -> None:
    """`model.generate` repeats each row of an input by itself, so that several pictures of one row
    would be mixed up. Raises ConfigError.
    """
    several = max(settings.get(key) or 1 for key in ("num_beams", "num_return_sequences"))
    pixels = inputs.get("pixel_values")
    if several > 1 and images > 1 and pixels is not None and len(pixels) != 1:
        raise ConfigError(
            "num_beams and num_return_sequences above 1 need a prompt with one image; with several "
            "this model would see them in another order."
        )


@torch.no_grad()
def answer(
    model: Any,
    renderer: Renderer,
    prompts: Sequence[str],
    settings: Mapping[str, Any],
    batch: int = 8,
) -> list[str]:
    """Returns the continuation of each prompt, without the token that ends it. The model's mode is
    restored.

    settings: keyword arguments of `model.generate`. Prompts of similar length form a batch, padded
    on the left. Raises WeftError if a prompt and its answer exceed the model's positions.
    """
    tokenizer = renderer.tokenizer
    coded = [renderer.prompt_ids(prompt) for prompt in prompts]
    check_fits(model, coded, settings)
    check_ids(coded, tokenizer, model.config, "prompt")
    keywords = _keywords(tokenizer, renderer, model, settings)
    pad = padding(tokenizer, model.config)[0]
    order = sorted(range(len(coded)), key=lambda i: (-len(coded[i]), i))
    texts = [""] * len(coded)
    with in_eval(model):
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            ids, mask = _left_padded([coded[i] for i in chosen], pad, model.device)
            out = model.generate(input_ids=ids, attention_mask=mask, **keywords)
            for i, row in zip(chosen, out[:, ids.shape[1] :], strict=True):
                texts[i] = _decoded(tokenizer, row)
    return texts


def _keywords(
    tokenizer: Any, renderer: Renderer, model: Any, settings: Mapping[str, Any]
) -> dict[str, Any]:
    ends = {tokenizer.eos_token_id, *renderer.stops} - {None}
    return {
        "pad_token_id": padding(tokenizer, model.config)[0],
        "use_cache": True,
        **({"eos_token_id": sorted(ends)} if ends else {}),
        **settings,
    }


def _decoded(tokenizer: Any, row: torch.Tensor) -> str:
    """The text of an answer [length]."""
    return str(tokenizer.decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def check_fits(model: Any, coded: list[list[int]], settings: Mapping[str, Any]) -> None:
    """Raises WeftError for the first tokenized prompt that is empty, or that exceeds, with its
    answer, the positions of the model.
    """
    positions, new = max_positions(model.config, model), settings.get("max_new_tokens", 0)
    for number, ids in enumerate(coded, 1):
        if not ids:
            raise WeftError(
                f"prompt {number} is empty, and the tokenizer puts nothing before a text."
            )
        if positions is not None and len(ids) + new > positions:
            raise WeftError(
                f"prompt {number} has {len(ids)} tokens; with {new} new ones that is more than the "
                f"model's {positions} positions."
            )


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raises ConfigError, with the nearest names, if `model.generate` has no setting of a name, and
    if text is given to one that takes none: the word "no" would count as true.
    """
    from transformers import GenerationConfig

    known = GenerationConfig().to_dict()
    for key, value in settings.items():
        if isinstance(value, str) and key in known and key not in TEXTS:
            raise ConfigError(
                f"--set {key}={value}: this is text; {key} takes a number, true or false, or a list."
            )
        if key not in known:
            near = get_close_matches(key, known, n=2) or [
                "max_new_tokens",
                "num_beams",
                "do_sample",
            ]
            raise ConfigError(
                f"--set {key}: model.generate has no setting of that name. Nearest: "
                f"{', '.join(near)}."
            )


def _left_padded(
    rows: list[list[int]], pad: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Input ids [rows, length] and attention mask [rows, length]."""
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=device)
    mask = torch.tensor(
        [[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device
    )
    return ids, mask
