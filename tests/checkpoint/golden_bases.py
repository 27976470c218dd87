"""The bases of tests/golden/checkpoints: their weights follow from integers, so they are the same on
every machine and with every version of torch.
"""

from __future__ import annotations

import zlib
from typing import Any

import torch
from checkpoint_support import GPT2, TINY, ids, logits
from torch import Tensor

INPUT = ids()
KINDS = {
    "llama": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    ),
    "gpt2": ("GPT2ForSequenceClassification", "GPT2Config", {**GPT2, "num_labels": 3}),
}


def fill(t: Tensor, key: str, scale: float) -> None:
    """Puts numbers of at most `scale` into the tensor that depend on `key` and nothing else."""
    index = torch.arange(t.numel(), dtype=torch.int64) + zlib.crc32(key.encode()) % 100_003
    mixed = (index * 2_654_435_761) % 2**32
    t.copy_((scale * (mixed.double() / 2**31 - 1)).reshape(t.shape))


def base(kind: str) -> Any:
    """A tiny model of transformers, in eval mode."""
    import transformers

    transformers.logging.set_verbosity_error()
    model, config, changes = KINDS[kind]
    built = getattr(transformers, model)(
        getattr(transformers, config)(**{**TINY, **changes})
    ).eval()
    with torch.no_grad():
        for name, p in built.named_parameters():
            norm = "norm" in name or ".ln_" in name
            fill(p, name, 0.3)
            if norm and name.endswith("weight"):
                p.add_(1.0)
    return built


__all__ = ["INPUT", "KINDS", "base", "fill", "logits"]
