"""The models of the benchmark, from configurations with random weights (stories15m has its real
ones), and their batches.

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

from . import shared

VOCABULARY = 512
DEPTHS = (32, 16, 8, 4, 2)  # layers of the 7B-shaped model that a GPU has room for
LEAST_ROW, MOST_ROW = 128, 512  # tokens of one sequence


@dataclass(frozen=True)
class Setup:
    """One shape. `tokens` are those of one micro-batch; `r` is for contenders that name no rank of
    their own.

    flow: the gradient goes back to the output of the input embedding in every contender, as it does
    in the limit. Else an adapter spares the first layer's input gradient, which the limit computes,
    and the limit would be none.
    threads: torch's threads while the case runs; 0 keeps those of the command.
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
    threads: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        for field, allowed in (
            ("model", MODELS),
            ("targets", ("all-linear", "q,v")),
            ("dtype", ("float32", "bfloat16")),
            ("device", ("cpu", "cuda")),
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
    """`blocks` begins the names of all adapted layers; `qv` ends those that "q,v" means. `targets`
    is what "all-linear" means to Weft, if that is not its own "all-linear".
    """

    build: Callable[[], nn.Module]
    blocks: str
    qv: tuple[str, ...]
    targets: Any = "all-linear"


def linears(width: int, depth: int) -> nn.Sequential:
    """Square layers one behind the other, with biases, whose outputs keep the size of the input."""
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(depth)))
    for p in model.parameters():
        nn.init.normal_(p, std=width**-0.5)
    return model


def stories15m(real: bool) -> nn.Module:
    """stories15M from shared/data, or the same configuration with random weights."""
    import transformers

    if real:
        found: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(
            str(shared.STORIES), dtype=torch.float32
        )
        return found
    config = transformers.LlamaConfig(
        vocab_size=32000,
        hidden_size=288,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )
    model: nn.Module = transformers.LlamaForCausalLM(config)
    return model


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
    "llama-704": Architecture(lambda: llama(704, 6, 1920), "model.layers.", _QV),
    "llama-768": Architecture(lambda: llama(768, 6, 2048), "model.layers.", _QV),
    "llama-1024": Architecture(lambda: llama(1024, 2, 2816), "model.layers.", _QV),
    "llama-2048": Architecture(lambda: llama(2048, 2, 5632), "model.layers.", _QV),
    "roberta-base": Architecture(roberta, "roberta.encoder.layer.", ("query", "value")),
    "gpt2": Architecture(gpt2, "transformer.h.", ("c_attn",)),
    "llama-tiny": Architecture(lambda: llama(32, 2, 48), "model.layers.", _QV),  # for the tests
    "gpt2-tiny": Architecture(lambda: gpt2(32, 2), "transformer.h.", ("c_attn",)),
    "stories15m": Architecture(lambda: stories15m(real=True), "model.layers.", _QV),
    "stories15m-random": Architecture(lambda: stories15m(real=False), "model.layers.", _QV),
    **{
        f"linear-{width}": Architecture(lambda w=width, d=depth: linears(w, d), "", (), r"\d+")  # type: ignore[misc]
        for width, depth in ((64, 16), (1024, 16), (4096, 16))
    },
    "linear-tiny": Architecture(lambda: linears(16, 3), "", (), r"\d+"),
    **{
        f"llama-7b/{n}": Architecture(  # n of its 32 layers
            lambda n=n: llama(4096, n, 11008, 32000),  # type: ignore[misc]
            "model.layers.",
            _QV,
        )
        for n in (*DEPTHS, 0)
    },
    **{
        f"llama-7b-tiny/{n}": Architecture(lambda n=n: llama(32, n, 48), "model.layers.", _QV)  # type: ignore[misc]
        for n in (4, 2, 0)
    },
}
STORIES = "stories15m" if shared.has_stories() else "stories15m-random"


def build(setup: Setup, seed: int = 0) -> nn.Module:
    """Returns the frozen base, in eval mode.

    A model for a GPU is created there, in its own dtype: 7B numbers would take minutes on a CPU.
    """
    if setup.device == "cpu":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = MODELS[setup.model].build()
        return model.to(setup.torch_dtype).requires_grad_(False).eval()
    before = torch.get_default_dtype()
    torch.set_default_dtype(setup.torch_dtype)
    try:
        with torch.random.fork_rng(), torch.device(setup.device):
            torch.manual_seed(seed)
            model = MODELS[setup.model].build()
    finally:
        torch.set_default_dtype(before)
    return model.to(setup.device).requires_grad_(False).eval()


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
    spec = MODELS[setup.model]
    return spec.targets if setup.targets == "all-linear" else list(spec.qv)


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
    return {"input_ids": ids.to(setup.device), "labels": labels.to(setup.device)}


@torch.no_grad()
def wake(named: Mapping[str, Tensor]) -> None:
    """Move every trained number off its start, where most updates and half of the gradients are
    zero.

    The numbers depend on the tensor's name alone, so two contenders of one equation get the same.
    """
    for name, p in named.items():
        generator = torch.Generator(p.device).manual_seed(zlib.crc32(name.encode()))
        size = 0.2 * float(p.float().abs().mean()) or 0.1
        noise = torch.randn(p.shape, generator=generator, device=p.device) * size
        p.add_(noise.to(p.dtype))
