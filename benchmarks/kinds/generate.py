"""Text generation: greedy decoding with a cache, for one row and for eight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..contenders import AGREE, IdleError, equation, split
from ..setup import Setup, build
from ..timing import Rounds, Work, interleave, now
from .inference import check_effect, model_for

ROWS = (1, 8)
PROMPT, NEW = 16, 32  # tokens of the prompt, and tokens that follow it


def measure(setup: Setup, contenders: tuple[str, ...], rounds: Rounds) -> dict[str, Any]:
    """Metrics for one row and for eight: seconds_1, seconds_8 of one `generate`; tokens_1, tokens_8
    new tokens per second, over all rows.

    "base" (the bare model), "merged.METHOD:r", "weft.METHOD:r", "peft.METHOD:r". Every one generates
    the same number of tokens: no token ends a text.
    """
    base = build(setup)
    vocabulary = base.get_input_embeddings().num_embeddings  # type: ignore[operator]
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(5, vocabulary, (max(ROWS), PROMPT), generator=generator)
    prompt = prompt.to(setup.device)
    works: dict[str, Work] = {}
    with torch.no_grad():
        logits = {"base": base(prompt).logits}
    for name in contenders:
        with torch.no_grad():
            model = model_for(name, base, setup)
            _check(name, model(prompt).logits, logits, setup)
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
        works[name] = _work(model, prompt, setup.device)
    samples: dict[str, Any] = interleave(works, rounds)
    for found in samples.values():
        for rows in ROWS:
            found[f"tokens_{rows}"] = [rows * NEW / s for s in found[f"seconds_{rows}"]]
    return {"samples": samples}


def _check(name: str, found: Tensor, logits: dict[str, Tensor], setup: Setup) -> None:
    """Raises IdleError if an adapter does nothing, or if two contenders of one equation differ."""
    check_effect(name, found, logits["base"], setup)
    _, method, own = split(name, setup)
    first = logits.setdefault(equation(method, own), found) if method else logits["base"]
    gap = float((found - first).abs().max() / first.abs().max())
    if gap > AGREE[setup.torch_dtype]:
        raise IdleError(f"{name} differs from the first of its equation by {gap:.1e}.")


def _work(model: Any, prompt: Tensor, device: str) -> Work:
    def run() -> Mapping[str, float]:
        times = {}
        for rows in ROWS:
            ids = prompt[:rows]
            mask = torch.ones_like(ids)
            started = now(device)
            out = model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False
            )
            times[f"seconds_{rows}"] = now(device) - started
            if out.shape != (rows, PROMPT + NEW):
                raise IdleError(f"generated {list(out.shape)} in place of {[rows, PROMPT + NEW]}.")
        return times

    return run
