"""Text from a causal language model: a batch of prompts, tokenized as in training, to their
continuations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..errors import WeftError
from .render import Renderer


@torch.no_grad()
def answer(
    model: Any,
    renderer: Renderer,
    prompts: Sequence[str],
    generation: Mapping[str, Any],
    batch: int = 8,
) -> list[str]:
    """One continuation a prompt, in their order, without what ends it. The model's mode is put
    back.

    generation: keyword arguments of `model.generate`. Prompts of like length go into one batch,
    padded on the left. Raises WeftError: a prompt that does not fit into the model's positions
    together with its answer.
    """
    tokenizer = renderer.tokenizer
    coded = [renderer.prompt_ids(prompt) for prompt in prompts]
    check_room(model.config, coded, generation)
    ends = {tokenizer.eos_token_id, *renderer.stops} - {None}
    pad = (
        tokenizer.pad_token_id
        if tokenizer.pad_token_id is not None
        else next(iter(sorted(ends)), 0)
    )
    settings = {
        "pad_token_id": pad,
        "use_cache": True,
        **({"eos_token_id": sorted(ends)} if ends else {}),
        **generation,
    }
    order = sorted(range(len(coded)), key=lambda i: (-len(coded[i]), i))
    texts = [""] * len(coded)
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            ids, mask = _padded([coded[i] for i in chosen], pad, model.device)
            out = model.generate(input_ids=ids, attention_mask=mask, **settings)
            for i, row in zip(chosen, out[:, ids.shape[1] :], strict=True):
                texts[i] = tokenizer.decode(
                    row, skip_special_tokens=True, clean_up_tokenization_spaces=False
                )
    finally:
        model.train(was_training)
    return texts


def _padded(
    rows: list[list[int]], pad: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=device)
    mask = torch.tensor(
        [[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device
    )
    return ids, mask


def places_of(config: Any) -> int | None:
    """Positions of the model of this configuration; None: it has no end."""
    return getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)


def check_room(config: Any, coded: list[list[int]], generation: Mapping[str, Any]) -> None:
    """Raises WeftError for the first prompt that does not fit, with its answer, into the model of
    this configuration.
    """
    places, new = places_of(config), generation.get("max_new_tokens", 0)
    for number, ids in enumerate(coded, 1):
        if not ids:
            raise WeftError(
                f"prompt {number} is empty, and the tokenizer puts nothing before a text."
            )
        if places is not None and len(ids) + new > places:
            raise WeftError(
                f"prompt {number} has {len(ids)} tokens; with {new} new ones that is more than the "
                "model's "
                f"{places} positions."
            )
