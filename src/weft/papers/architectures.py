"""The models of the papers' tables, from transformers' classes, on the meta device: all shapes, no
numbers.

Sizes are as published by the authors. Parts that a table needs and a class lacks are added here and
stated in `remark`: separate q, k and v for GPT-2 and GPT-3, and VL-BART's visual embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

SPLIT = "the fused c_attn is built as its three maps q, k, v, which compute the same"


@dataclass(frozen=True)
class Architecture:
    """`build` creates the model; call it under the meta device. `remark` is how it differs from the
    published class.
    """

    build: Callable[[], nn.Module]
    remark: str = ""

    def on_meta(self) -> nn.Module:
        """Returns the model on the meta device."""
        with torch.device("meta"):
            return self.build().eval()


class SplitMap(nn.Module):
    """GPT-2's c_attn with separate q, k and v: the same output and parameters, in three layers."""

    def __init__(self, q_proj: nn.Module, k_proj: nn.Module, v_proj: nn.Module) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = q_proj, k_proj, v_proj

    def forward(self, x: Tensor) -> Tensor:
        """Returns q, k and v side by side [..., 3 width] for x [..., width]."""
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)


def gpt2(
    width: int,
    layers: int,
    positions: int = 1024,
    tied: bool = True,
    vocabulary: int = 50257,
    heads: int | None = None,
    inner: int | None = None,
) -> nn.Module:
    """Returns a GPT-2 with separate q, k and v."""
    import transformers
    from transformers.pytorch_utils import Conv1D

    config = transformers.GPT2Config(
        vocab_size=vocabulary,
        n_embd=width,
        n_layer=layers,
        n_head=heads or width // 64,
        n_inner=inner,
        n_positions=positions,
        tie_word_embeddings=tied,
    )
    model: Any = transformers.GPT2LMHeadModel(config)
    for block in model.transformer.h:
        block.attn.c_attn = SplitMap(*(Conv1D(width, width) for _ in range(3)))
    made: nn.Module = model
    return made


def roberta(width: int, layers: int) -> nn.Module:
    """Returns a RoBERTa with a head for two classes, as on most GLUE tasks."""
    import transformers

    config = transformers.RobertaConfig(
        vocab_size=50265,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        max_position_embeddings=514,
        type_vocab_size=1,
        num_labels=2,
    )
    model: nn.Module = transformers.RobertaForSequenceClassification(config)
    return model


def vit(width: int, layers: int, classes: int = 100) -> nn.Module:
    """Returns a ViT for 224 pixels in patches of 16, with a head for CIFAR-100's classes."""
    import transformers

    config = transformers.ViTConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        image_size=224,
        patch_size=16,
        num_labels=classes,
    )
    model: nn.Module = transformers.ViTForImageClassification(config)
    return model


def _llama_config(
    width: int,
    inner: int,
    layers: int,
    heads: int,
    key_heads: int | None = None,
    vocabulary: int = 32000,
) -> Any:
    import transformers

    return transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads or heads,
        tie_word_embeddings=False,
    )


def llama(*sizes: int) -> nn.Module:
    """Returns a LLaMA of this width, MLP width, layers, heads, key heads and vocabulary."""
    import transformers

    model: nn.Module = transformers.LlamaForCausalLM(_llama_config(*sizes))
    return model


def vl_bart(features: int) -> nn.Module:
    """Returns BART-base with 200 more tokens and a visual embedding for features of this width."""
    from ..models.vl_bart import EXTRA_TOKENS, VLBartConfig, VLBartForConditionalGeneration

    config = VLBartConfig(
        vocab_size=50265 + len(EXTRA_TOKENS),
        d_model=768,
        encoder_layers=6,
        decoder_layers=6,
        encoder_attention_heads=12,
        decoder_attention_heads=12,
        encoder_ffn_dim=3072,
        decoder_ffn_dim=3072,
        max_position_embeddings=1024,
        feat_dim=features,
    )
    model: nn.Module = VLBartForConditionalGeneration(config)
    return model


def llava() -> nn.Module:
    """Returns Vicuna-7B, CLIP ViT-L/14 at 336 pixels, and the projector of two
    layers between them.
    """
    import transformers

    vision = transformers.CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )
    text = _llama_config(4096, 11008, 32, 32)
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, tie_word_embeddings=False
    )
    model: nn.Module = transformers.LlavaForConditionalGeneration(config)
    return model


_VISUAL = "BART-base with 200 more tokens and VL-BART's visual embedding"

# LLaMA2-7B differs in what it was trained on and in the length of its context, which no tensor
# shows.
_LLAMA_7B = Architecture(lambda: llama(4096, 11008, 32, 32))

ARCHITECTURES: dict[str, Architecture] = {
    "GPT-2 medium": Architecture(lambda: gpt2(1024, 24), SPLIT),
    "GPT-2 large": Architecture(lambda: gpt2(1280, 36), SPLIT),
    "GPT-3 175B": Architecture(
        lambda: gpt2(12288, 96, 2048, tied=False, heads=96),
        f"a GPT-2 of GPT-3's size with a separate output matrix; {SPLIT}",
    ),
    "RoBERTa-base": Architecture(lambda: roberta(768, 12)),
    "RoBERTa-large": Architecture(lambda: roberta(1024, 24)),
    "ViT-B/16": Architecture(lambda: vit(768, 12)),
    "ViT-L/16": Architecture(lambda: vit(1024, 24)),
    "LLaMA-7B": _LLAMA_7B,
    "LLaMA-13B": Architecture(lambda: llama(5120, 13824, 40, 40)),
    "LLaMA2-7B": _LLAMA_7B,
    "LLaMA3-8B": Architecture(lambda: llama(4096, 14336, 32, 32, 8, 128256)),
    "VL-BART image": Architecture(lambda: vl_bart(2048), f"{_VISUAL} for features of 2048"),
    "VL-BART video": Architecture(lambda: vl_bart(512), f"{_VISUAL} for features of 512"),
    "LLaVA-1.5-7B": Architecture(llava),
}
