"""The parts of multimodal models: containers named by `within`, heads, blocks, the stack before the
output.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import weft

pytest.importorskip("transformers")

from animals import ZOO

from weft.model.structure import Structure

pytestmark = pytest.mark.filterwarnings("ignore:No output depends on", "ignore:targets=")

CONTAINERS = [
    ("llava", "language_model"),
    ("llava", "vision_tower"),
    ("llava", "multi_modal_projector"),
    ("llava_next", "multi_modal_projector"),
    ("qwen2_5_vl", "language_model"),
    ("qwen2_5_vl", "visual"),
    ("qwen3_vl", "visual"),
    ("qwen3_vl", "merger"),
    ("smolvlm", "text_model"),
    ("smolvlm", "connector"),
    ("gemma3", "language_model"),
    ("florence2", "language_model"),
    ("blip", "text_decoder"),
    ("blip2", "language_model"),
    ("blip2", "qformer"),
    ("instructblip", "language_model"),
    ("mllama", "vision_model"),
    ("vision_encoder_decoder", "decoder"),
    ("whisper", "encoder"),
]


@pytest.mark.parametrize(("name", "container"), CONTAINERS)
def test_a_container_by_name_means_all_linear_maps_in_it(name, container):
    """Without embeddings, the head and what nothing reads, and without a regular expression."""
    from transformers.pytorch_utils import Conv1D

    model = ZOO[name].build()
    head = ("lm_head", "cls")
    wanted = [
        n
        for n, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and container in n.split(".")
        and not any(part in head for part in n.split("."))
        and not any(f".{part}." in f".{n}." for part in ZOO[name].unread)
    ]
    adapter = weft.attach(model, weft.DoRA(r=2, targets="all-linear", within=container))
    assert list(adapter.sites) == wanted
    assert wanted
    outside = [f for f in adapter.frozen if f.reason.startswith("outside of within")]
    assert all(container not in f.name.split(".") for f in outside)


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("blip", ["text_decoder.cls"]),
        ("blip_retrieval", ["itm_head"]),
        ("llava", ["lm_head"]),
        ("blip2", ["language_model.lm_head"]),
        ("kosmos2", ["text_model.lm_head"]),
        ("vilt", ["classifier"]),
        ("lxmert", ["answer_head"]),
        ("clip", []),
    ],
)
def test_the_head_is_found_inside_another_model_too(name, head):
    found = Structure.of(ZOO[name].build()).head
    assert [n for n in found if not any(n.startswith(f"{h}.") for h in head)] == head


def test_mergers_beside_blocks_are_no_blocks():
    structure = Structure.of(ZOO["qwen3_vl"].build())
    assert {b.stack for b in structure.blocks} == {
        "model.visual.blocks",
        "model.language_model.layers",
    }
    model = ZOO["qwen3_vl"].build()
    mlp = weft.attach(model, weft.LoRA(r=2, targets="mlp"), name="mlp")
    assert not any("merger" in n for n in mlp.sites)
    every = weft.attach(model, weft.LoRA(r=2, targets="all-linear"), name="all")
    assert sum("deepstack_merger_list" in n for n in every.sites) == 2


def test_lists_without_attention_are_blocks_where_no_list_beside_them_has_it():
    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6)) for _ in range(2))
            self.more = nn.ModuleList(nn.Sequential(nn.Linear(6, 6)) for _ in range(2))

    assert len(Structure.of(Mixer()).blocks) == 4


def test_the_stack_before_the_output_is_the_one_beside_the_head():
    """Kosmos-2 registers its tower after its text model."""
    model = ZOO["kosmos2"].build()
    assert Structure.of(model).last_stack == "text_model.model.layers"
    adapter = weft.attach(model, weft.TopLayers(k=1))
    assert all(n.startswith("text_model.") for n in adapter.selected)


def test_full_fine_tuning_trains_all_that_an_output_depends_on():
    model = ZOO["llava"].build()
    numbers = sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        unread = sum(
            p.numel()
            for n, p in model.named_parameters()
            if any(f".{part}." in f".{n}" for part in ZOO["llava"].unread)
        )
    assert weft.attach(model, weft.Full()).num_parameters == numbers - unread
