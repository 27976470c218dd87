"""The models behind the tables: their sizes, and that GPT-2 with q, k and v apart is the same
model.
"""

import copy

import pytest
import torch

import weft
from weft.papers.architectures import ARCHITECTURES, SplitMap, gpt2, vl_bart


def test_gpt2_with_q_k_v_apart_computes_what_the_published_class_computes():
    from transformers import GPT2LMHeadModel
    from transformers.pytorch_utils import Conv1D

    apart = gpt2(24, 2, positions=16, vocabulary=31, heads=3).eval()
    for p in apart.parameters():
        torch.nn.init.normal_(p, std=0.3)
    fused = GPT2LMHeadModel(copy.deepcopy(apart.config)).eval()
    weights = {}
    for name, value in apart.state_dict().items():
        parts = [name.replace("q_proj", part) for part in ("q_proj", "k_proj", "v_proj")]
        if "q_proj" in name:
            weights[name.replace(".q_proj", "")] = torch.cat(
                [apart.state_dict()[part] for part in parts], dim=-1
            )
        elif "k_proj" not in name and "v_proj" not in name:
            weights[name] = value
    fused.load_state_dict(weights)
    assert isinstance(apart.transformer.h[0].attn.c_attn, SplitMap)
    assert isinstance(fused.transformer.h[0].attn.c_attn, Conv1D)
    ids = torch.arange(14).reshape(2, 7)
    with torch.no_grad():
        assert torch.allclose(apart(input_ids=ids).logits, fused(input_ids=ids).logits, atol=1e-5)
    assert sum(p.numel() for p in apart.parameters()) == sum(p.numel() for p in fused.parameters())


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("GPT-2 medium", 354_823_168),
        ("GPT-2 large", 774_030_080),
        ("GPT-3 175B", 175_221_817_344),
        ("RoBERTa-base", 124_647_170),
        ("LLaMA-7B", 6_738_415_616),
        ("LLaMA-13B", 13_015_864_320),
        ("LLaMA3-8B", 8_030_261_248),
        ("VL-BART image", 141_156_864),
        ("VL-BART video", 139_977_216),
        ("LLaVA-1.5-7B", 7_062_902_784),
    ],
)
def test_an_architecture_has_the_published_size_and_no_numbers(name, numbers):
    model = ARCHITECTURES[name].on_meta()
    assert sum(p.numel() for p in model.parameters()) == numbers
    assert all(p.is_meta for p in model.parameters())


def test_vl_bart_has_36_maps_of_q_and_v_and_the_biases_of_the_paper():
    with torch.device("meta"):
        model = vl_bart(2048)
    assert len(weft.attach(model, weft.LoRA(r=1, targets=["q_proj", "v_proj"])).sites) == 36
    visual = sum(
        p.numel()
        for name, p in model.named_parameters()
        if "visual_embedding" in name and name.endswith("bias")
    )
    assert weft.attach(model, weft.BitFit(), "biases").num_parameters - visual == 125_952
    assert sum(p.numel() for p in model.model.encoder.visual_embedding.parameters()) == 1_582_848
