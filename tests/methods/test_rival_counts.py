"""The papers' numbers of trained parameters for adapters and selections, on models of full size
without a single weight.

The rows come from the facts' own list; the models are built here, and no formula of that list is
used.
"""

import json
from functools import cache

import pytest
import torch

import weft


@cache
def base(name):
    """The architecture of a row, on the meta device."""
    transformers = pytest.importorskip("transformers")
    t, sizes = transformers, {"medium": (1024, 24), "large": (1280, 36), "175B": (12288, 96)}
    with torch.device("meta"):
        if name.startswith("GPT"):
            width, layers = sizes[name.split()[-1]]
            large = (
                {"n_positions": 2048, "tie_word_embeddings": False} if name == "GPT-3 175B" else {}
            )
            return t.GPT2LMHeadModel(
                t.GPT2Config(n_embd=width, n_layer=layers, n_head=width // 64, **large)
            )
        if name.startswith("RoBERTa"):
            width, layers = (768, 12) if name.endswith("base") else (1024, 24)
            return t.RobertaForSequenceClassification(
                t.RobertaConfig(
                    vocab_size=50265,
                    hidden_size=width,
                    intermediate_size=4 * width,
                    num_hidden_layers=layers,
                    num_attention_heads=width // 64,
                    max_position_embeddings=514,
                    type_vocab_size=1,
                )
            )
        if name.startswith("ViT"):
            width, layers = (768, 12) if "-B/" in name else (1024, 24)
            return t.ViTForImageClassification(
                t.ViTConfig(
                    hidden_size=width,
                    intermediate_size=4 * width,
                    num_hidden_layers=layers,
                    num_attention_heads=width // 64,
                    num_labels=100,
                )
            )
        width, inner, layers = (4096, 11008, 32) if name == "LLaMA-7B" else (5120, 13824, 40)
        return t.LlamaForCausalLM(
            t.LlamaConfig(
                vocab_size=32000,
                hidden_size=width,
                intermediate_size=inner,
                num_hidden_layers=layers,
                num_attention_heads=width // 128,
            )
        )


def method(row):
    """The configuration of a row, from what its `config` says."""
    c = row["config"]
    if row["method"] == "Parallel":
        return weft.Bottleneck(preset="parallel", r=c["bottleneck"], targets=c["targets"])
    if row["method"] == "Adapter^D":
        return weft.Bottleneck(preset="drop", r=c["bottleneck"], skip_layers=c["dropped_layers"])
    presets = {
        "Adapter^H": "houlsby",
        "Adapter^L": "lin",
        "Adapter^P": "pfeiffer",
        "Series": "series",
    }
    if row["method"] in presets:
        return weft.Bottleneck(preset=presets[row["method"]], r=c["bottleneck"])
    return {"FT": weft.Full, "FT^Top2": weft.TopLayers, "BitFit": weft.BitFit}[row["method"]]()


@pytest.mark.shared
@pytest.mark.parametrize(
    ("names", "number"),
    [
        (("Adapter^H", "Adapter^L", "Adapter^P", "Adapter^D"), 18),
        (("Series", "Parallel"), 4),
        (("FT", "FT^Top2", "BitFit"), 11),
    ],
)
def test_every_row_of_the_papers_with_a_count(shared, names, number):
    rows = [
        row
        for row in json.loads((shared / "facts" / "param_counts.json").read_text(encoding="utf-8"))
        if row["method"] in names and not row["base_model"].startswith(("VL", "LLaVA"))
    ]
    assert len(rows) == number
    for row in rows:
        model = base(row["base_model"])
        adapter = weft.attach(model, method(row))
        # The head is trained and counted apart, but for the one row whose configuration names it.
        counted = adapter.num_parameters - (
            0 if row["id"] in ("057", "013") else adapter.num_head_parameters
        )
        assert counted == (row["computed_trainable_params"] or row["computed"]), (
            row["id"],
            row["row"],
        )
        weft.detach(model)


@pytest.mark.parametrize(
    ("name", "config", "numbers", "head"),
    [
        ("GPT-2 medium", weft.TopLayers(k=2), 25_194_496, 0),
        ("GPT-2 medium", weft.TopLayers(k=24), 25_194_496 + 22 * (12 * 1024**2 + 13 * 1024), 0),
        ("RoBERTa-base", weft.BitFit(), 102_144, 0),
        ("RoBERTa-base", weft.BitFit(modules_to_save=["classifier"]), 102_144 + 592_130, 592_130),
        (
            "RoBERTa-base",
            weft.TopLayers(k=1, modules_to_save=["classifier"]),
            7_087_872 + 592_130,
            592_130,
        ),
        ("RoBERTa-base", weft.Full(), 124_647_170, 592_130),
        ("RoBERTa-base", weft.Head(), 592_130, 592_130),
        ("RoBERTa-large", weft.BitFit(), 271_360, 0),
        ("RoBERTa-large", weft.Head(), 1_051_650, 1_051_650),
        ("ViT-B/16", weft.Head(), 76_900, 76_900),
        ("ViT-B/16", weft.Full(), 85_798_656 + 76_900, 76_900),
        ("ViT-B/16", weft.BitFit(), 12 * (4 * 768 + 3072 + 768 + 2 * 768) + 2 * 768, 0),
        ("ViT-L/16", weft.Full(), 303_301_632 + 102_500, 102_500),
    ],
)
def test_selections_with_the_head_apart(name, config, numbers, head):
    model = base(name)
    adapter = weft.attach(model, config)
    found = (adapter.num_parameters, adapter.num_head_parameters)
    weft.detach(model)
    assert found == (numbers, head)
