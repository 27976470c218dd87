"""The papers' own numbers of trained parameters, on models of full size without a single weight."""

import json
from functools import cache

import pytest
import torch

import weft
from support import METHODS

LLAMA = {
    "LLaMA-7B": {},
    "LLaMA3-8B": {"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256},
}
SAME = {"LLaMA2-7B": "LLaMA-7B"}


@cache
def llama(name="LLaMA-7B"):
    transformers = pytest.importorskip("transformers")
    sizes = {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    }
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**sizes, **LLAMA[name]}))


def roberta(width, layers):
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        return transformers.RobertaForSequenceClassification(
            transformers.RobertaConfig(
                vocab_size=50265,
                hidden_size=width,
                intermediate_size=4 * width,
                num_hidden_layers=layers,
                num_attention_heads=width // 64,
                max_position_embeddings=514,
                type_vocab_size=1,
            )
        )


@pytest.mark.shared
def test_llama_rows_of_the_dora_paper(shared):
    rows = [
        row
        for row in json.loads((shared / "facts" / "param_counts.json").read_text(encoding="utf-8"))
        if row["base_model"] in (*LLAMA, *SAME)
        and row["method"] in METHODS
        and row.get("computed_trainable_params")
    ]
    rows = [
        row for row in rows if "rank" in row["config"]
    ]  # others have no rank: weft papers rebuilds them
    assert len(rows) >= 17 and {row["method"] for row in rows} == {"LoRA", "VeRA", "DoRA", "DVoRA"}
    for row in rows:
        targets = [t.removesuffix("_proj") + "_proj" for t in row["config"]["targets"]]
        model = llama(SAME.get(row["base_model"], row["base_model"]))
        adapter = weft.attach(
            model, METHODS[row["method"]](r=row["config"]["rank"], targets=targets)
        )
        assert adapter.num_parameters == row["computed_trainable_params"], row["id"]
        weft.detach(model)


@pytest.mark.parametrize(
    ("config", "base", "large"),
    [
        # VeRA paper, table 1 and 2; LoRA's and VeRA's heads are not counted.
        (weft.LoRA(r=8, targets=["query", "value"]), 294_912, 786_432),
        (weft.VeRA(r=1024, targets=["query", "value"]), 43_008, 98_304),
        (weft.BitFit(), 102_144, 271_360),
    ],
)
def test_roberta(config, base, large):
    assert weft.attach(roberta(768, 12), config).num_parameters == base
    assert weft.attach(roberta(1024, 24), config).num_parameters == large


def test_all_linear_maps_of_llama_7b_are_the_seven_of_the_paper():
    model = llama()
    adapter = weft.attach(model, weft.DVoRA(r=1024))
    assert len(adapter.sites) == 7 * 32 and adapter.num_parameters == 2_949_120
    assert {m.rpartition(".")[2] for m in adapter.sites} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    }
    weft.detach(model)
