"""Tiny mixtures of experts of transformers, and what their experts compute, one token and one expert
at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import oracle
import weft
from weft.model.layer import AdapterLayer

E, WIDTH = 5, 24
_COMMON = {
    "vocab_size": 61,
    "hidden_size": WIDTH,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_CHOICE = {"num_experts_per_tok": 2, "head_dim": 8}
_ROUTED = {"n_routed_experts": E, "moe_intermediate_size": 20, "n_group": 1, "topk_group": 1}
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": E, **_CHOICE},
    "qwen3_moe": {"num_experts": E, "moe_intermediate_size": 20, **_CHOICE},
    "olmoe": {"num_experts": E, "num_experts_per_tok": 2},
    "gpt_oss": {
        "num_local_experts": E,
        **_CHOICE,
        "layer_types": ["full_attention"] * 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "deepseek_v3": {
        **_ROUTED,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 4,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 12,
        "kv_lora_rank": 12,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
    "llama4_text": {
        "num_local_experts": E,
        "num_experts_per_tok": 1,
        "head_dim": 8,
        "intermediate_size_mlp": 36,
        "interleave_moe_layer_step": 1,
        "attention_chunk_size": 16,
    },
    "aria_text": {"moe_num_experts": E, "moe_topk": 2, "moe_num_shared_experts": 1, "head_dim": 8},
    "nemotron_h": {
        **_ROUTED,
        **_CHOICE,
        "moe_shared_expert_intermediate_size": 20,
        "layers_block_type": ["moe", "attention"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 1,
    },
}


def model(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
    """A tiny model with random weights, in eval mode."""
    torch.manual_seed(0)
    made: Any = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(name, **{**_COMMON, **MODELS[name], **changes})
    )
    for p in made.parameters():
        nn.init.normal_(p, std=0.2)
    if dtype == torch.float64 and name != "llama4_text":  # which the grouped product lacks
        made.set_experts_implementation("eager")
    return made.to(dtype).eval()


def ids(rows: int = 3, length: int = 6) -> Tensor:
    return torch.randint(3, 61, (rows, length), generator=torch.Generator().manual_seed(1))


def experts_of(made: nn.Module) -> dict[str, nn.Module]:
    """The modules of fused experts by name."""
    return {n: m for n, m in made.named_modules() if n.endswith("experts") and "shared" not in n}


class Alone(nn.Module):
    """One module of experts by itself, behind a choice that is given."""

    def __init__(self, name: str) -> None:
        super().__init__()
        made = model(name, torch.float64)
        self.experts = next(m for n, m in experts_of(made).items() if hasattr(m, "down_proj"))

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        if not hasattr(self.experts, "has_gate"):  # Llama 4: every token for every expert, weighted
            scores = torch.zeros(len(hidden), E, dtype=hidden.dtype).scatter(1, index, weights)
            every = (hidden[None] * scores.t()[:, :, None]).reshape(-1, hidden.shape[1])
            return self.experts(every).view(E, *hidden.shape).sum(0)
        return self.experts(hidden, index, weights)


def call(tokens: int = 7, seed: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, a choice of two experts each of which expert 3 gets no token, and weights."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, WIDTH, generator=g, dtype=torch.float64)
    others = torch.tensor([0, 1, 2, 4])
    index = torch.stack([others[torch.randperm(4, generator=g)[:2]] for _ in range(tokens)])
    return hidden, index, torch.rand(tokens, 2, generator=g, dtype=torch.float64)


def by_definition(
    experts: Any, weights: Mapping[str, Sequence[Tensor]], given: Sequence[Tensor]
) -> Tensor:
    """The output of a module whose expert e has the weight `weights[name][e]` [out, in]."""
    first = "up_proj" if "up_proj" in weights else "gate_up_proj"
    llama = not hasattr(experts, "has_gate")

    def linear(name: str, e: int, x: Tensor) -> Tensor:
        bias = getattr(experts, f"{name}_bias", None)
        y = weights[name][e] @ x
        return y if bias is None else y + bias[e]

    def expert(e: int, x: Tensor) -> Tensor:
        h = linear(first, e, x)
        if llama:
            gate, up = h.chunk(2)
            h = up * experts.act_fn(gate)
        else:
            h = experts._apply_gate(h) if experts.has_gate else experts.act_fn(h)
        return linear("down_proj", e, h)

    hidden, index, scores = given
    rows = []
    for t in range(len(hidden)):
        parts = []
        for k in range(index.shape[1]):
            e, w = int(index[t, k]), scores[t, k]
            parts.append(expert(e, hidden[t] * w) if llama else expert(e, hidden[t]) * w)
        rows.append(torch.stack(parts).sum(0))
    return torch.stack(rows)


def stored(experts: Any, name: str) -> Tensor:
    """W [E, out, in] of a weight, a view."""
    W: Tensor = getattr(experts, name).detach()
    turned = getattr(experts, "is_transposed", not hasattr(experts, "has_gate"))
    return W.transpose(1, 2) if turned else W


def effective(layer: AdapterLayer, W: Tensor, tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """W' [out, in] of every expert from the papers' equations, with the graph of `tensors`."""
    method, found = layer.method, []
    shared = layer.shared
    for e in range(len(W)):
        own = {name: t[e] for name, t in tensors.items()}
        own |= {name: layer.get_buffer(name)[e].double() for name in layer._buffers}
        if shared is not None:
            own |= {"shared.A": shared.A.double(), "shared.B": shared.B.double()}
        found.append(oracle.ORACLES[type(method).__name__](W[e].double(), own, method))
    return found


def move(adapter: weft.model.adapter.Adapter, seed: int = 4) -> None:
    """Moves every trained tensor off its start."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in adapter.named_parameters():
            size = 0.2 * float(p.abs().mean()) if name.endswith(".m") else 0.2
            p.add_(size * torch.randn(p.shape, generator=g, dtype=torch.float64).to(p.dtype))
