"""Tiny multimodal and encoder-decoder models of transformers, built from configurations: nothing is
downloaded. Each has an input whose images, texts and sounds reach every part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

WORDS, IMAGE, START = 61, 60, 3  # the vocabulary, the id of an image's tokens, and the first word
TEXT = {
    "vocab_size": WORDS,
    "hidden_size": 24,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA = {**TEXT, "num_key_value_heads": 1}
VISION = {
    "hidden_size": 20,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,  # so 4 patches
}
BART = {
    "vocab_size": WORDS,
    "d_model": 24,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 44,
    "decoder_ffn_dim": 44,
    "max_position_embeddings": 64,
    "dropout": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]}


@dataclass(frozen=True)
class Animal:
    """One architecture. `config` makes its configuration, `inputs` a batch of so many rows.

    unread: endings of what "all-linear" leaves out because no output depends on it. untouched: what
    these inputs do not reach, by the part of a name, so that the audit names it. prompts: why
    Prefix, PreEmbed and PreLayer do not attach, a part of the reason; "" if they do.
    """

    cls: str
    config: Callable[[], Any]
    inputs: Callable[[int], dict[str, Tensor]]
    unread: tuple[str, ...] = ()
    untouched: tuple[str, ...] = ()
    prefix: str = ""
    virtual: str = ""
    biases: bool = True

    def build(self, seed: int = 0) -> nn.Module:
        """The model, seeded, with no number of it small or at a round value."""
        import transformers

        from weft.models import register

        register()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            cls = getattr(transformers, self.cls, None)
            if cls is None:
                from weft.models import vl_bart

                cls = getattr(vl_bart, self.cls)
            model = cls(self.config()).eval()
            for p in model.parameters():
                nn.init.normal_(p, std=0.2) if p.ndim > 1 else p.data.add_(
                    0.1 * torch.randn_like(p)
                )
            return model


def words(rows: int, length: int = 6, seed: int = 0) -> Tensor:
    """Token ids [rows, length] without marks and images."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(START, IMAGE - 5, (rows, length), generator=generator)


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_images(tokens: int, size: int = 8, **more: Callable[[int], Tensor]) -> Any:
    """Inputs of a model whose text has `tokens` image tokens a row, for one image a row."""

    def inputs(rows: int) -> dict[str, Tensor]:
        image = torch.full((rows, tokens), IMAGE)
        ids = torch.cat([words(rows, 2), image, words(rows, 4, seed=2)], 1)
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": noise(rows, 3, size, size),
            **{key: make(rows) for key, make in more.items()},
        }

    return inputs


def with_grid(merged: int, patch: int) -> Any:
    """Inputs of a Qwen-VL: patches of all images in one list, and their grids."""

    def inputs(rows: int) -> dict[str, Tensor]:
        start, end = torch.full((rows, 1), IMAGE - 2), torch.full((rows, 1), IMAGE - 3)
        image = torch.full((rows, merged), IMAGE)
        ids = torch.cat([words(rows, 1), start, image, end, words(rows, 4, seed=2)], 1)
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": noise(rows * merged * 4, 3 * 2 * patch * patch),
            "image_grid_thw": torch.tensor([[1, 2, 2 * merged]] * rows),
            "mm_token_type_ids": (ids == IMAGE).int(),
        }

    return inputs


def beside(key: str = "pixel_values", *shape: int, text: str = "input_ids") -> Any:
    """Inputs of a model that reads a text and, in another argument, [rows, *shape]."""

    def inputs(rows: int) -> dict[str, Tensor]:
        return {text: words(rows), key: noise(rows, *(shape or (3, 8, 8)))}

    return inputs


def _of(name: str, **parts: Any) -> Callable[[], Any]:
    def config() -> Any:
        import transformers

        return getattr(transformers, name)(**parts)

    return config


def _sub(model_type: str, **parts: Any) -> dict[str, Any]:
    return {"model_type": model_type, **parts}


def _vision_encoder_decoder() -> Any:
    import transformers

    return transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.ViTConfig(**VISION, **STILL),
        transformers.GPT2Config(
            vocab_size=WORDS,
            n_embd=24,
            n_layer=2,
            n_head=2,
            n_positions=32,
            resid_pdrop=0,
            embd_pdrop=0,
            attn_pdrop=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
        decoder_start_token_id=1,
        pad_token_id=0,
    )


def _vl_bart() -> Any:
    from weft.models.vl_bart import VLBartConfig

    return VLBartConfig(**BART, feat_dim=16)


def _vl_bart_inputs(rows: int) -> dict[str, Tensor]:
    return {
        "input_ids": words(rows),
        "vis_feats": noise(rows, 1, 5, 16),
        "vis_boxes": noise(rows, 1, 5, 4, seed=3),
        "decoder_input_ids": words(rows, 5, seed=4),
    }


def _lxmert_inputs(rows: int) -> dict[str, Tensor]:
    return {
        "input_ids": words(rows),
        "visual_feats": noise(rows, 3, 14),
        "visual_pos": noise(rows, 3, 4, seed=3),
    }


def _visual_bert_inputs(rows: int) -> dict[str, Tensor]:
    ids = words(rows)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "visual_embeds": noise(rows, 3, 14),
        "visual_attention_mask": torch.ones(rows, 3),
    }


def _kosmos_inputs(rows: int) -> dict[str, Tensor]:
    ids = torch.cat([words(rows, 1), words(rows, 3, seed=3), words(rows, 4, seed=2)], 1)
    mask = torch.zeros_like(ids)
    mask[:, 1:4] = 1
    return {
        "input_ids": ids,
        "pixel_values": noise(rows, 3, 8, 8),
        "image_embeds_position_mask": mask,
    }


def _mllama_inputs(rows: int) -> dict[str, Tensor]:
    ids = torch.cat([torch.full((rows, 1), IMAGE), words(rows, 5)], 1)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": noise(rows, 1, 4, 3, 8, 8),
        "aspect_ratio_ids": torch.ones(rows, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.tensor([[[1, 0, 0, 0]]] * rows),
        "cross_attention_mask": torch.tensor([[[[1, 0, 0, 0]]]] * rows).expand(rows, 6, 1, 4),
    }


def _text_and_answer(rows: int) -> dict[str, Tensor]:
    return {"input_ids": words(rows), "decoder_input_ids": words(rows, 5, seed=4)}


def _image_and_answer(key: str, *shape: int) -> Any:
    def inputs(rows: int) -> dict[str, Tensor]:
        return {key: noise(rows, *shape), "decoder_input_ids": words(rows, 5, seed=4)}

    return inputs


def _florence_inputs(rows: int) -> dict[str, Tensor]:
    return {**with_images(5, size=16)(rows), "decoder_input_ids": words(rows, 5, seed=4)}


def _llava_next_inputs(rows: int) -> dict[str, Tensor]:
    # One view of the whole image and one tile: 4 patches each, and a line break a row of the tile.
    inputs = with_images(10)(rows)
    return {
        **inputs,
        "pixel_values": noise(rows, 2, 3, 8, 8),
        "image_sizes": torch.tensor([[8, 8]] * rows),
    }


def _idefics_inputs(rows: int) -> dict[str, Tensor]:
    inputs = with_images(1)(rows)
    return {**inputs, "pixel_values": inputs["pixel_values"][:, None]}


def _instructblip_inputs(rows: int) -> dict[str, Tensor]:
    return {**with_images(3)(rows), "qformer_input_ids": words(rows, 4, seed=7)}


GEMMA = {**LLAMA, "head_dim": 12}
QFORMER = {
    "vocab_size": WORDS,
    "hidden_size": 18,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 30,
    "encoder_hidden_size": 20,
    "max_position_embeddings": 32,
    **STILL,
}
OPT = {
    "vocab_size": WORDS,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "ffn_dim": 44,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": 24,
    "dropout": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
QWEN_VISION = {
    "depth": 2,
    "hidden_size": 24,
    "num_heads": 2,
    "intermediate_size": 36,
    "patch_size": 2,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 24,
}
QWEN_TEXT = {**LLAMA, "rope_parameters": ROPE}
QWEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": IMAGE - 1,
    "vision_start_token_id": IMAGE - 2,
    "vision_end_token_id": IMAGE - 3,
}

ZOO: dict[str, Animal] = {
    "llava": Animal(
        "LlavaForConditionalGeneration",
        _of(
            "LlavaConfig",
            text_config=_sub("llama", **LLAMA),
            vision_config=_sub("clip_vision_model", **{**VISION, "num_hidden_layers": 3}),
            image_token_index=IMAGE,
            image_seq_length=4,
        ),
        with_images(4),
        unread=("vision_tower.encoder.layers.2", "vision_tower.post_layernorm"),
    ),
    "llava_next": Animal(
        "LlavaNextForConditionalGeneration",
        _of(
            "LlavaNextConfig",
            text_config=_sub("llama", **LLAMA),
            vision_config=_sub("clip_vision_model", **{**VISION, "num_hidden_layers": 3}),
            image_token_index=IMAGE,
            image_seq_length=4,
            image_grid_pinpoints=[[8, 8]],
        ),
        _llava_next_inputs,
        unread=("vision_tower.encoder.layers.2", "vision_tower.post_layernorm"),
    ),
    "qwen2_5_vl": Animal(
        "Qwen2_5_VLForConditionalGeneration",
        _of(
            "Qwen2_5_VLConfig",
            text_config=_sub("qwen2_5_vl_text", **QWEN_TEXT),
            vision_config={**QWEN_VISION, "fullatt_block_indexes": [1], "window_size": 8},
            **QWEN_IDS,
        ),
        with_grid(2, 2),
        virtual="three-dimensional positions",
    ),
    "qwen3_vl": Animal(
        "Qwen3VLForConditionalGeneration",
        _of(
            "Qwen3VLConfig",
            text_config=_sub("qwen3_vl_text", **{**QWEN_TEXT, "head_dim": 12}),
            vision_config={
                **QWEN_VISION,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0],
            },
            **QWEN_IDS,
        ),
        with_grid(2, 2),
        virtual="three-dimensional positions",
    ),
    "smolvlm": Animal(
        "SmolVLMForConditionalGeneration",
        _of(
            "SmolVLMConfig",
            text_config=_sub("llama", **LLAMA),
            vision_config=VISION,
            image_token_id=IMAGE,
            scale_factor=2,
            pad_token_id=0,
        ),
        _idefics_inputs,
    ),
    "idefics3": Animal(
        "Idefics3ForConditionalGeneration",
        _of(
            "Idefics3Config",
            text_config=_sub("llama", **LLAMA),
            vision_config=VISION,
            image_token_id=IMAGE,
            scale_factor=2,
            pad_token_id=0,
        ),
        _idefics_inputs,
    ),
    "paligemma": Animal(
        "PaliGemmaForConditionalGeneration",
        _of(
            "PaliGemmaConfig",
            text_config=_sub("gemma", **GEMMA),
            vision_config=_sub("siglip_vision_model", **VISION, vision_use_head=False),
            image_token_index=IMAGE,
            projection_dim=24,
            hidden_size=24,
        ),
        with_images(4),
        virtual="prepares the attention mask",
    ),
    "gemma3": Animal(
        "Gemma3ForConditionalGeneration",
        _of(
            "Gemma3Config",
            text_config=_sub("gemma3_text", **GEMMA, sliding_window=16),
            vision_config=_sub("siglip_vision_model", **VISION, vision_use_head=False),
            image_token_index=IMAGE,
            boi_token_index=IMAGE - 1,
            eoi_token_index=IMAGE - 2,
            mm_tokens_per_image=4,
        ),
        with_images(4),
        virtual="prepares the attention mask",
    ),
    "florence2": Animal(
        "Florence2ForConditionalGeneration",
        _of(
            "Florence2Config",
            text_config=_sub("bart", **BART),
            vision_config={
                "depths": [1, 1],
                "patch_size": [3, 3],
                "patch_stride": [4, 2],
                "patch_padding": [1, 1],
                "patch_prenorm": [False, True],
                "embed_dim": [8, 16],
                "num_heads": [2, 2],
                "num_groups": [2, 2],
                "window_size": 2,
                "drop_path_rate": 0.0,
                "projection_dim": 24,
            },
            image_token_id=IMAGE,
        ),
        _florence_inputs,
        virtual="virtual tokens in its decoder are not supported",
    ),
    "blip": Animal(
        "BlipForConditionalGeneration",
        _of(
            "BlipConfig",
            text_config={
                **TEXT,
                "encoder_hidden_size": 20,
                "projection_dim": 12,
                "sep_token_id": 2,
            },
            vision_config={**VISION, "projection_dim": 12},
            projection_dim=12,
            image_text_hidden_size=12,
        ),
        beside(),
        prefix="attention written by hand",
    ),
    "blip_retrieval": Animal(
        "BlipForImageTextRetrieval",
        _of(
            "BlipConfig",
            text_config={**TEXT, "encoder_hidden_size": 20, "sep_token_id": 2},
            vision_config=VISION,
            projection_dim=12,
            image_text_hidden_size=12,
        ),
        beside(),
        prefix="attention written by hand",
        untouched=("vision_proj", "text_proj"),
    ),
    "blip2": Animal(
        "Blip2ForConditionalGeneration",
        _of(
            "Blip2Config",
            text_config=_sub("opt", **OPT),
            vision_config=VISION,
            qformer_config=QFORMER,
            num_query_tokens=3,
            image_token_index=IMAGE,
        ),
        with_images(3),
    ),
    "instructblip": Animal(
        "InstructBlipForConditionalGeneration",
        _of(
            "InstructBlipConfig",
            text_config=_sub("opt", **OPT),
            vision_config=VISION,
            qformer_config=QFORMER,
            num_query_tokens=3,
            image_token_index=IMAGE,
        ),
        _instructblip_inputs,
        untouched=("qformer.encoder.layer.1.intermediate", "qformer.encoder.layer.1.output."),
    ),
    "git": Animal(
        "GitForCausalLM",
        _of("GitConfig", vision_config=VISION, **TEXT, **STILL),
        beside(),
        prefix="attention written by hand",
        virtual="to the text itself",
    ),
    "vilt": Animal(
        "ViltForQuestionAnswering",
        _of(
            "ViltConfig",
            **{**TEXT, "max_position_embeddings": 16},
            image_size=8,
            patch_size=4,
            num_labels=5,
        ),
        beside(),
        prefix="attention written by hand",
        virtual="to the text itself",
    ),
    "clip": Animal(
        "CLIPModel",
        _of(
            "CLIPConfig",
            text_config={**TEXT, "eos_token_id": 2},
            vision_config=VISION,
            projection_dim=12,
        ),
        beside(),
    ),
    "siglip": Animal(
        "SiglipModel",
        _of("SiglipConfig", text_config={**TEXT, "projection_size": 20}, vision_config=VISION),
        beside(),
    ),
    "kosmos2": Animal(
        "Kosmos2ForConditionalGeneration",
        _of(
            "Kosmos2Config",
            text_config={
                "vocab_size": WORDS,
                "embed_dim": 24,
                "layers": 2,
                "ffn_dim": 44,
                "attention_heads": 2,
                "max_position_embeddings": 64,
                "dropout": 0.0,
                "attention_dropout": 0.0,
            },
            vision_config=VISION,
            latent_query_num=3,
        ),
        _kosmos_inputs,
        prefix="positions='kept'",
        virtual="to the text itself",
    ),
    "whisper": Animal(
        "WhisperForConditionalGeneration",
        _of(
            "WhisperConfig",
            **{
                k: v
                for k, v in BART.items()
                if k not in ("max_position_embeddings", "forced_eos_token_id")
            },
            num_mel_bins=8,
            max_source_positions=10,
            max_target_positions=16,
        ),
        _image_and_answer("input_features", 8, 20),
        virtual="virtual tokens in its decoder are not supported",
    ),
    "vision_encoder_decoder": Animal(
        "VisionEncoderDecoderModel",
        _vision_encoder_decoder,
        _image_and_answer("pixel_values", 3, 8, 8),
        virtual="virtual tokens in its decoder are not supported",
        unread=("encoder.pooler",),
    ),
    "lxmert": Animal(
        "LxmertForQuestionAnswering",
        _of(
            "LxmertConfig",
            **{k: v for k, v in TEXT.items() if k != "num_hidden_layers"},
            l_layers=1,
            x_layers=2,
            r_layers=1,
            visual_feat_dim=14,
            num_qa_labels=5,
            **STILL,
        ),
        _lxmert_inputs,
        prefix="attention written by hand",
        virtual="to the text itself",
        untouched=("x_layers.1.visn_",),
    ),
    "visual_bert": Animal(
        "VisualBertForQuestionAnswering",
        _of("VisualBertConfig", **TEXT, visual_embedding_dim=14, num_labels=5, **STILL),
        _visual_bert_inputs,
        prefix="attention written by hand",
        virtual="to the text itself",
        unread=("visual_bert.pooler",),
    ),
    "mllama": Animal(
        "MllamaForConditionalGeneration",
        _of(
            "MllamaConfig",
            text_config={**LLAMA, "num_hidden_layers": 3, "cross_attention_layers": [1]},
            vision_config={
                "hidden_size": 20,
                "num_hidden_layers": 2,
                "num_global_layers": 1,
                "attention_heads": 2,
                "intermediate_size": 36,
                "image_size": 8,
                "patch_size": 4,
                "intermediate_layers_indices": [0],
                "vision_output_dim": 40,
                "max_num_tiles": 4,
            },
            image_token_index=IMAGE,
        ),
        _mllama_inputs,
        virtual="a text token",
    ),
    "t5": Animal(
        "T5ForConditionalGeneration",
        _of(
            "T5Config",
            vocab_size=WORDS,
            d_model=24,
            d_kv=12,
            d_ff=44,
            num_layers=2,
            num_heads=2,
            dropout_rate=0.0,
            decoder_start_token_id=0,
        ),
        _text_and_answer,
        virtual="virtual tokens in its decoder are not supported",
        biases=False,
    ),
    "bart": Animal(
        "BartForConditionalGeneration",
        _of("BartConfig", **BART),
        _text_and_answer,
        virtual="virtual tokens in its decoder are not supported",
    ),
    "vl_bart": Animal(
        "VLBartForConditionalGeneration",
        _vl_bart,
        _vl_bart_inputs,
        virtual="virtual tokens in its decoder are not supported",
    ),
}


def answer(model: nn.Module, given: Mapping[str, Tensor]) -> Tensor:
    """The numbers that a model is for: its logits [...]."""
    torch.manual_seed(0)  # ViLT draws the patches that it sees
    out = model(**given)
    for key in ("logits", "question_answering_score", "logits_per_image", "itm_score"):
        if getattr(out, key, None) is not None:
            found: Tensor = getattr(out, key)
            return found
    raise AssertionError(f"{type(model).__name__} answers with {list(out.keys())}")
