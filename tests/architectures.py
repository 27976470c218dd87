"""Small models of many architectures, built from configurations: nothing is downloaded.

Each entry: how to build it, an input, and what is expected to be found in it, counted by hand from
the architecture: `attention` and `mlp` are the linear maps a block has, times its blocks, and
`beside` those outside the blocks that are no head, no embedding and no router (poolers,
projections). Then all-linear = attention + mlp + beside.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

# Neither square nor powers of two; head counts must divide the width.
SMALL = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True)
class Architecture:
    """`head`: the modules that are an output head of their own, none where it is tied to the
    embedding. `frozen`: what the plan must name, and a part of its reason.
    """

    build: Callable[[], nn.Module]
    attention: int
    mlp: int
    beside: int = 0
    head: tuple[str, ...] = ()
    biases: bool = True
    frozen: tuple[tuple[str, str], ...] = ()
    vision: bool = False
    decoder: bool = False

    def inputs(self, rows: int = 2) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)
        if self.vision:
            return {"pixel_values": torch.randn(rows, 3, 8, 8, generator=generator)}
        ids = torch.randint(3, SMALL["vocab_size"], (rows, 7), generator=generator)
        return (
            {"input_ids": ids, "decoder_input_ids": ids[:, :5]}
            if self.decoder
            else {"input_ids": ids}
        )


def transformer(model: str, config: str, **changes: Any) -> Callable[[], nn.Module]:
    """A seeded builder for a class of transformers, without dropout."""

    def build() -> nn.Module:
        import transformers

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            made = getattr(transformers, model)(
                getattr(transformers, config)(**{**SMALL, **changes})
            ).eval()
            if "num_experts_per_tok" in changes:  # the default's grouped product knows no float64
                made.set_experts_implementation("eager")
            for p in (
                made.parameters()
            ):  # biases start at 0 and embeddings tiny, which would hide what goes wrong with them
                torch.nn.init.normal_(p, std=0.2) if p.ndim > 1 else p.data.add_(
                    0.1 * torch.randn_like(p)
                )
            return made

    return build


GPT2 = {
    "n_embd": 24,
    "n_layer": 3,
    "n_head": 3,
    "n_positions": 32,
    "resid_pdrop": 0,
    "embd_pdrop": 0,
    "attn_pdrop": 0,
}
NO_DROPOUT = {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 20, "num_key_value_heads": 1}
FUSED = (
    ("layers.{0..2}.mlp.experts.gate_up_proj", 'fused experts, which only targets="experts"'),
    ("layers.{0..2}.mlp.experts.down_proj", 'fused experts, which only targets="experts"'),
)
ROUTER = ("layers.{0..2}.mlp.gate.weight", "router of a mixture of experts")

ARCHITECTURES: dict[str, Architecture] = {
    # c_attn, c_proj | c_fc, c_proj
    "gpt2": Architecture(
        transformer("GPT2LMHeadModel", "GPT2Config", **GPT2),
        6,
        6,
        frozen=(("lm_head", "output head"),),
    ),
    "opt": Architecture(
        transformer("OPTForCausalLM", "OPTConfig", ffn_dim=44, word_embed_proj_dim=20, dropout=0),
        12,
        6,
        2,
        frozen=(("embed_positions", "OPTLearnedPositionalEmbedding computes something else"),),
    ),
    "gpt_neox": Architecture(
        transformer("GPTNeoXForCausalLM", "GPTNeoXConfig"), 6, 6, head=("lm_head",)
    ),
    "llama": Architecture(
        transformer("LlamaForCausalLM", "LlamaConfig", num_key_value_heads=1),
        12,
        9,
        head=("lm_head",),
        biases=False,
    ),
    "qwen3": Architecture(
        transformer("Qwen3ForCausalLM", "Qwen3Config", num_key_value_heads=1, head_dim=8),
        12,
        9,
        head=("lm_head",),
        biases=False,
    ),
    "gemma": Architecture(
        transformer("GemmaForCausalLM", "GemmaConfig", num_key_value_heads=1, head_dim=8),
        12,
        9,
        biases=False,
        frozen=(("embed_tokens", "GemmaTextScaledWordEmbedding computes something else"),),
    ),
    "phi": Architecture(transformer("PhiForCausalLM", "PhiConfig"), 12, 6, head=("lm_head",)),
    # encoder: q k v o | wi wo; decoder: the same, and cross-attention
    "t5": Architecture(
        transformer(
            "T5ForConditionalGeneration",
            "T5Config",
            d_model=24,
            d_kv=8,
            d_ff=44,
            num_layers=3,
            num_heads=3,
            decoder_start_token_id=0,
            dropout_rate=0,
        ),
        36,
        12,
        biases=False,
        decoder=True,
        frozen=(("encoder.block.0.layer.0.SelfAttention.relative_attention_bias", "embedding"),),
    ),
    # and the pooler
    "bert": Architecture(
        transformer("BertForSequenceClassification", "BertConfig", **NO_DROPOUT),
        12,
        6,
        1,
        head=("classifier",),
    ),
    "roberta": Architecture(
        transformer("RobertaForSequenceClassification", "RobertaConfig", **NO_DROPOUT),
        12,
        6,
        head=("classifier.dense", "classifier.out_proj"),
    ),
    "vit": Architecture(
        transformer(
            "ViTForImageClassification", "ViTConfig", image_size=8, patch_size=2, **NO_DROPOUT
        ),
        12,
        6,
        head=("classifier",),
        vision=True,
        frozen=(("vit.embeddings.patch_embeddings.projection", "convolution"),),
    ),
    "mixtral": Architecture(
        transformer("MixtralForCausalLM", "MixtralConfig", num_local_experts=5, **EXPERTS),
        12,
        0,
        head=("lm_head",),
        biases=False,
        frozen=(*FUSED, ROUTER),
    ),
    "qwen3_moe": Architecture(
        transformer("Qwen3MoeForCausalLM", "Qwen3MoeConfig", num_experts=5, head_dim=8, **EXPERTS),
        12,
        0,
        head=("lm_head",),
        biases=False,
        frozen=(*FUSED, ROUTER),
    ),
    "qwen2_moe": Architecture(
        transformer(
            "Qwen2MoeForCausalLM",
            "Qwen2MoeConfig",
            num_experts=5,
            shared_expert_intermediate_size=20,
            **EXPERTS,
        ),
        12,
        9,
        head=("lm_head",),
        frozen=(*FUSED, ROUTER, ("shared_expert_gate", "router of a mixture of experts")),
    ),
    "olmoe": Architecture(
        transformer("OlmoeForCausalLM", "OlmoeConfig", num_experts=5, **EXPERTS),
        12,
        0,
        head=("lm_head",),
        biases=False,
        frozen=(*FUSED, ROUTER),
    ),
    "gpt_oss": Architecture(
        transformer(
            "GptOssForCausalLM", "GptOssConfig", num_local_experts=5, head_dim=8, **EXPERTS
        ),
        12,
        0,
        head=("lm_head",),
        frozen=(*FUSED, ("layers.{0..2}.mlp.router.weight", "router of a mixture of experts")),
    ),
}
