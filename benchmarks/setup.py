"""The models of the benchmark, from configurations with random weights, and their batches.

The vocabulary is small, so that the head, which no method touches, does not hide what the adapted
layers cost.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 512
LEAST_ROW, MOST_ROW = 128, 512  # tokens of one sequence


@dataclass(frozen=True)
class Setup:
    """One shape. `tokens` are those of one micro-batch; `r` is for contenders that name no rank of
    their own.

    flow: the gradient goes back to the output of the input embedding in every contender, as it does
    in the limit. Else an adapter spares the first layer's input gradient, which the limit computes,
    and the limit would be none.
    """

    model: str = "llama-768"
    tokens: int = 1024
    r: int = 16
    targets: str = "all-linear"
    dtype: str = "float32"
    accumulate: int = 1
    checkpointing: bool = False
    dropout: float = 0.0
    flow: bool = True

    def __post_init__(self) -> None:
        for field, allowed in (
            ("model", MODELS),
            ("targets", ("all-linear", "q,v")),
            ("dtype", ("float32", "bfloat16")),
        ):
            if getattr(self, field) not in allowed:
                raise ValueError(
                    f"Setup({field}={getattr(self, field)!r}): it must be one of {list(allowed)}."
                )

    @property
    def torch_dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.dtype)
        return found


@dataclass(frozen=True)
class Architecture:
    """`blocks` begins the names of all adapted layers; `qv` ends those that "q,v" means."""

    build: Callable[[], nn.Module]
    blocks: str
    qv: tuple[str, ...]


def llama(width: int, layers: int, inner: int, vocabulary: int = VOCABULARY) -> nn.Module:
    import transformers

    heads = max(1, width // (128 if width >= 4096 else 64))
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=4096,
    )
    model: nn.Module = transformers.LlamaForCausalLM(config)
    return model


def roberta() -> nn.Module:
    import transformers

    config = transformers.RobertaConfig(
        vocab_size=VOCABULARY,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=MOST_ROW + 2,
        type_vocab_size=1,
        num_labels=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # so that contenders can be compared
    model: nn.Module = transformers.RobertaForSequenceClassification(config)
    return model


def gpt2(width: int = 768, layers: int = 12) -> nn.Module:
    import transformers

    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=width,
        n_layer=layers,
        n_head=max(1, width // 64),
        n_positions=1024,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    model: nn.Module = transformers.GPT2LMHeadModel(config)
    return model


_QV = ("q_proj", "v_proj")
MODELS: Mapping[str, Architecture] = {
    "llama-768": Architecture(lambda: llama(768, 6, 2048), "model.layers.", _QV),
    "llama-1024": Architecture(lambda: llama(1024, 2, 2816), "model.layers.", _QV),
    "llama-2048": Architecture(lambda: llama(2048, 2, 5632), "model.layers.", _QV),
    "roberta-base": Architecture(roberta, "roberta.encoder.layer.", ("query", "value")),
    "gpt2": Architecture(gpt2, "transformer.h.", ("c_attn",)),
    "llama-tiny": Architecture(lambda: llama(32, 2, 48), "model.layers.", _QV),  # for the tests
    "gpt2-tiny": Architecture(lambda: gpt2(32, 2), "transformer.h.", ("c_attn",)),
}


def build(setup: Setup, seed: int = 0) -> nn.Module:
    """The frozen base, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MODELS[setup.model].build()
    return model.to(setup.torch_dtype).requires_grad_(False).eval()


def twin(model: nn.Module) -> nn.Module:
    """A second model over the very same weights, so that no contender has the luckier place in
    memory.
    """
    shared = {id(p): nn.Parameter(p.data, requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, shared)


def layers(model: nn.Module, setup: Setup) -> Iterator[tuple[str, int, int]]:
    """(name, out, in) of every layer that an adapter has to reach, found without Weft's help."""
    from transformers.pytorch_utils import Conv1D

    spec = MODELS[setup.model]
    for name, module in model.named_modules():
        if not name.startswith(spec.blocks) or (
            setup.targets == "q,v" and not name.endswith(spec.qv)
        ):
            continue
        if isinstance(module, nn.Linear):
            yield name, module.out_features, module.in_features
        elif isinstance(module, Conv1D):
            yield name, module.weight.shape[1], module.weight.shape[0]


def weft_targets(setup: Setup) -> Any:
    """`targets=` of a Weft configuration."""
    return "all-linear" if setup.targets == "all-linear" else list(MODELS[setup.model].qv)


def shape(tokens: int) -> tuple[int, int]:
    """Rows and length: 128 is one row, 1024 are 4 rows of 256, 4096 are 8 of 512."""
    length = min(tokens, max(LEAST_ROW, min(MOST_ROW, tokens // 4)))
    return tokens // length, length


def batch(setup: Setup, seed: int = 1) -> dict[str, Tensor]:
    """Random ids, and labels of the kind that the model takes."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCABULARY, shape(setup.tokens), generator=generator)
    labels = (
        torch.randint(0, 2, ids.shape[:1], generator=generator)
        if setup.model == "roberta-base"
        else ids
    )
    return {"input_ids": ids, "labels": labels}


@torch.no_grad()
def wake(named: Mapping[str, Tensor]) -> None:
    """Move every trained number off its start, where most updates and half of the gradients are
    zero.

    The numbers depend on the tensor's name alone, so two contenders of one equation get the same.
    """
    for name, p in named.items():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        size = 0.2 * float(p.float().abs().mean()) or 0.1
        p.add_((torch.randn(p.shape, generator=generator) * size).to(p.dtype))
