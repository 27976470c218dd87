"""Where merging and converting go wrong in peft 0.21.2, and Weft is right, or refuses; see
test_peft_wrong.py.
"""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from checkpoint_support import (
    GPT2,
    attached,
    logits,
    peft_of,
    peft_saves,
    quiet,
    tiny,
    untied_gpt2,
    untouched,
)
from peft import LoraConfig
from peft_cases import lora, mine_of, peft_still, two, under, vera

import weft
from support import awake, distance, inputs, net

X = inputs("linear")


def test_add_weighted_adapter_of_one_dora_with_weight_one_is_not_that_dora(tmp_path):
    """It keeps B A and forgets the magnitudes. Weft has no such function; its merge is the adapter
    itself.
    """
    theirs = peft_of(net(), lora(use_dora=True))
    one, base = logits(theirs, X), logits(net(), X)
    mine = net()
    weft.load(mine, peft_saves(theirs, tmp_path))
    report = weft.merge(mine, verify=X)
    assert report.effect > 100 * report.output_error
    assert distance(logits(mine, X), one) < 1e-5
    with quiet() as said:
        theirs.add_weighted_adapter(["default"], [1.0], "sum", combination_type="linear")
    lost = float((under(theirs, "sum") - one).norm() / (one - base).norm())
    peft_still(said == [] and lost > 0.3, "a sum of one adapter with weight 1.0 is another adapter")


def test_a_dora_converted_to_lora_at_full_rank_is_another_adapter(tmp_path):
    """peft says that it supports it. W' - W of full rank is the adapter, as its singular vectors
    show.
    """
    theirs = peft_of(net(), lora(use_dora=True))
    one, base = logits(theirs, X), logits(net(), X)
    mine = net()
    weft.load(mine, peft_saves(theirs, tmp_path))
    by_hand = net()
    adapter = weft.attach(
        by_hand, weft.LoRA(r=9, alpha=9, targets={"layer": {"r": 7, "alpha": 7}, "mid": {}})
    )
    with torch.no_grad():
        for name, site in adapter.sites.items():
            layer = mine.get_submodule(name)
            U, S, V = torch.linalg.svd(
                weft.effective_weight(layer) - layer.weight, full_matrices=False
            )
            site.A.copy_(V)
            site.B.copy_(U * S)
    assert distance(logits(by_hand, X), one) < 1e-5
    with quiet():
        supported = theirs.supports_lora_conversion()
        config, tensors = peft.convert_to_lora(theirs, rank=7)
        converted = peft.get_peft_model(net(), config).eval()
        peft.set_peft_model_state_dict(converted, tensors)
    lost = float((logits(converted, X) - one).norm() / (one - base).norm())
    peft_still(supported and lost > 0.3, "the converted adapter is another one")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "make", [lora, lambda: lora(use_dora=True), vera], ids=["lora", "dora", "vera"]
)
def test_merge_and_unmerge_do_not_give_the_base_back(make, dtype, tmp_path):
    theirs = peft_of(net(dtype=dtype), make())
    mine = net(dtype=dtype)
    weft.load(mine, peft_saves(theirs, tmp_path))
    with untouched(mine, X.to(dtype)):
        weft.merge(mine)
        weft.unmerge(mine)
    theirs = theirs.base_model.model
    before = theirs.mid.base_layer.weight.clone()
    for layer in (theirs.layer, theirs.mid):
        layer.merge()
        layer.unmerge()
    peft_still(
        not torch.equal(theirs.mid.base_layer.weight, before),
        "the base has other bits after merge and unmerge",
    )


def test_switching_off_a_merged_adapter_unmerges_it_for_good(tmp_path):
    """peft unmerges in silence, by subtraction, and does not merge again; Weft says what to do."""
    theirs = peft_of(net(), lora())
    mine = net()
    weft.load(mine, peft_saves(theirs, tmp_path))
    weft.merge(mine)
    with pytest.raises(weft.MergeError, match=r"merged into the weights"), weft.use(mine, None):
        pass
    with quiet() as said:
        theirs.merge_adapter()
        with theirs.disable_adapter():
            logits(theirs, X)
    peft_still(
        said == [] and not theirs.base_model.model.mid.merged,
        "disable_adapter has unmerged the weights",
    )


def test_nan_is_merged_without_a_word(tmp_path):
    a = awake("LoRA")
    theirs = peft_of(net(), lora())
    with torch.no_grad():
        a.adapter.sites["mid"].B[0, 0] = float("nan")
        theirs.base_model.model.mid.lora_B["default"].weight[0, 0] = float("nan")
    with pytest.raises(weft.MergeError, match=r"'mid.B' holds NaN"):
        weft.merge(a.model)
    with quiet() as said:
        theirs.merge_adapter()
    peft_still(
        said == [] and bool(theirs.base_model.model.mid.base_layer.weight.isnan().any()),
        "NaN is merged in silence",
    )


def test_merging_into_a_tied_embedding_changes_the_head(tmp_path):
    """The adapter was for the embedding alone; the merged model has it in both."""

    def build() -> Any:
        return tiny("GPT2LMHeadModel", "GPT2Config", **GPT2)

    with pytest.raises(weft.TargetError, match=r"tied.*lm_head"):
        weft.attach(build(), weft.LoRA(r=3, alpha=5, targets=["wte"]))
    model = untied_gpt2()
    attached(model, weft.LoRA(r=3, alpha=5, targets=["wte"]))
    wanted = logits(model)
    weft.merge(model)
    assert distance(logits(model), wanted) < 1e-5
    theirs = peft_of(build(), LoraConfig(r=3, lora_alpha=5, target_modules=["wte"]))
    wanted = logits(theirs)
    with quiet() as said:
        merged = theirs.merge_and_unload()
    peft_still(
        said == [] and distance(logits(merged), wanted) > 0.5,
        "the merged model is another one, in silence",
    )


def test_unload_leaves_the_base_frozen():
    model = net()
    with untouched(model, X):
        weft.attach(model, weft.LoRA(r=3, targets=["mid"], modules_to_save=["head"]))
        weft.detach(model)
    assert all(p.requires_grad for p in model.parameters())
    with quiet():
        theirs = peft.get_peft_model(net(), lora()).unload()
    peft_still(
        not any(p.requires_grad for p in theirs.parameters()),
        "the model cannot be trained any more",
    )


# What older releases of peft had wrong and 0.21.2 has right: Weft is held to it all the same


def test_dora_on_a_square_conv1d_weight():
    """28 months long the norm was taken along the wrong side, which no shape betrays where the
    weight is square.
    """
    model = tiny("GPT2LMHeadModel", "GPT2Config", **GPT2)
    adapter = attached(model, weft.DoRA(r=3, alpha=5, targets=[r".*attn\.c_proj"]))
    layer, site = model.transformer.h[1].attn.c_proj, adapter.sites["transformer.h.1.attn.c_proj"]
    assert layer.weight.shape[0] == layer.weight.shape[1]
    V = layer.weight.t().double() + 5 / 3 * site.B.double() @ site.A.double()
    W = (site.m.double() / V.norm(dim=1))[:, None] * V
    x = torch.randn(3, 24)
    assert distance(layer(x), x.double() @ W.t() + layer.bias.double()) < 1e-5


def test_a_second_dora_cannot_be_merged_onto_the_first(tmp_path):
    theirs = two(lora(use_dora=True), lora(r=2, use_dora=True))
    model = mine_of(theirs, tmp_path)
    weft.merge(model, "a")
    with pytest.raises(weft.MergeError, match=r"'a' is already merged"):
        weft.merge(model, "b")
    assert distance(logits(model, X), under(theirs, "a")) < 1e-5
