"""Without gradients: a forward of the whole batch, and one generated token at batch 1 behind a
prompt.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import weft

from ..contenders import AGREE, LEAST_EFFECT, IdleError, attach_awake, split
from ..factory import make
from ..internals import bottleneck_presets
from ..setup import Setup, batch, build, twin, wake
from ..timing import Rounds, clocked, interleave

PROMPT = 128


def measure_forward(setup: Setup, contenders: tuple[str, ...], rounds: Rounds) -> dict[str, Any]:
    """Metric: seconds of one forward in eval mode. "base" is the model without any adapter."""
    base, ids = build(setup), batch(setup)["input_ids"]
    models = {name: model_for(name, base, setup) for name in contenders}
    with torch.no_grad():
        for name, model in models.items():
            check_effect(name, model(ids).logits, base(ids).logits, setup)
        works = {name: clocked(lambda m=model: m(ids)) for name, model in models.items()}  # type: ignore[misc]
        return {"samples": interleave(works, rounds)}


def measure_token(setup: Setup, contenders: tuple[str, ...], rounds: Rounds) -> dict[str, Any]:
    """Metric: seconds of the forward of one token at batch 1, with the keys and values of a prompt
    in the cache.

    "base", "merged.METHOD", "weft.METHOD" (not merged), "houlsby" and "lin" (Adapter H and L).
    Every merged model has weights of its own, and so has the base.
    """
    base = build(setup)
    ids = batch(setup)["input_ids"][:1, :PROMPT]
    key = cache_key(base)
    works = {}
    with torch.no_grad():
        for name in contenders:
            model = model_for(name, base, setup)
            check_effect(name, model(ids).logits, base(ids).logits, setup)
            works[name] = clocked(next_token(model, ids, key))
        return {"samples": interleave(works, rounds)}


def cache_key(base: nn.Module) -> str:
    """The name of the cache, which transformers 5.24 renamed as an argument and as a field."""
    return "cache" if "cache" in inspect.signature(base.forward).parameters else "past_key_values"


def next_token(model: Any, ids: Tensor, key: str) -> Callable[[], None]:
    """One token more, forgotten again, so that every call finds the same prompt in the cache."""
    given = {key: model(input_ids=ids, use_cache=True)[key]}
    token = ids[:, -1:]

    def run() -> None:
        model(input_ids=token, use_cache=True, **given).logits.argmax(-1)
        given[key].crop(-1)

    return run


def model_for(name: str, base: nn.Module, setup: Setup) -> Any:
    """Returns a contender's model in eval mode; "base" and "merged.METHOD" as in measure_token."""
    side, method, setup = split(name, setup)
    if side == "base":
        return twin(base).eval()
    if side == "merged":
        return _merged(method, base, setup)
    if side in bottleneck_presets():
        model = twin(base)
        adapter = weft.attach(model, weft.Bottleneck(preset=side, r=setup.r))
        wake(dict(adapter.named_parameters()))
        return model.eval()
    return make(name, base, setup).model.eval()


def _merged(method: str, base: nn.Module, setup: Setup) -> nn.Module:
    """Merged, and found to compute what the adapter beside the weights does."""
    own = build(setup)
    attach_awake(method, own, setup)
    ids = batch(setup)["input_ids"][:1, :PROMPT]
    wanted = own(ids).logits
    weft.merge(own, "default")
    found = own(ids).logits
    gap = float((found - wanted).abs().max() / wanted.abs().max())
    if gap > AGREE[setup.torch_dtype]:
        raise IdleError(
            f"merged.{method} differs from the adapter beside the weights by {gap:.1e}."
        )
    return own.eval()


def check_effect(name: str, found: Tensor, base: Tensor, setup: Setup) -> None:
    """Raises IdleError if an adapter leaves the output as it is, or if "base" does not."""
    effect = float((found - base).abs().max() / base.abs().max())
    if (effect > AGREE[setup.torch_dtype]) if name == "base" else (effect < LEAST_EFFECT):
        raise IdleError(f"{name} moves the base's output by {effect:.1e} (relative).")
