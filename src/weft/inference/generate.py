"""Text from a causal language model, for prompts that are tokenized as in training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import torch

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
    opened: Opened, prompts: Sequence[str], settings: dict[str, Any], chat: bool, batch: int = 8
) -> list[str]:
    """Returns the continuation of each prompt. With `chat` a prompt is a user's message for the
    tokenizer's chat template.

    settings: keyword arguments of `model.generate`. Raises ConfigError for an unknown one,
    WeftError if the model generates no text or a prompt does not fit.
    """
    check_settings(settings)
    check_generates(opened.model)
    renderer = opened.renderer
    if chat:
        prompts = [
            renderer.chat_prompt([{"role": "user", "content": prompt}]) for prompt in prompts
        ]
        renderer = renderer.bare()
    return answer(opened.model, renderer, prompts, settings, batch)


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
    ends = {tokenizer.eos_token_id, *renderer.stops} - {None}
    pad = padding(tokenizer, model.config)[0]
    keywords = {
        "pad_token_id": pad,
        "use_cache": True,
        **({"eos_token_id": sorted(ends)} if ends else {}),
        **settings,
    }
    order = sorted(range(len(coded)), key=lambda i: (-len(coded[i]), i))
    texts = [""] * len(coded)
    with in_eval(model):
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            ids, mask = _left_padded([coded[i] for i in chosen], pad, model.device)
            out = model.generate(input_ids=ids, attention_mask=mask, **keywords)
            for i, row in zip(chosen, out[:, ids.shape[1] :], strict=True):
                texts[i] = tokenizer.decode(
                    row, skip_special_tokens=True, clean_up_tokenization_spaces=False
                )
    return texts


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
