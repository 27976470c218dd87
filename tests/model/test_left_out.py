"""What "all-linear" leaves out: its share of the weights, in the plan and as a warning."""

import warnings

import pytest
import transformers
from torch import nn

import weft
from weft.model import left_out


def mixture():
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=8,
            tie_word_embeddings=True,
        )
    )


def numbers(model, part):
    return sum(p.numel() for name, p in model.named_parameters() if part in name)


def test_fused_experts_are_named_with_their_share():
    model = mixture()
    total, experts = numbers(model, ""), numbers(model, "experts")
    share = f"{100 * experts / total:.3g} %"
    with pytest.warns(UserWarning, match=rf"leaves out {share} of the MixtralForCausalLM's.*exp"):
        adapter = weft.attach(model, weft.LoRA(r=2))
    plan = adapter.plan()
    assert plan.base_parameters == total
    found = {s.kind: s.numbers for s in plan.left_out}
    assert found["experts"] == experts
    assert found["embedding"] == numbers(model, "embed_tokens")  # the head is tied to it: once
    assert f"experts {share}" in str(plan)


def test_frozen_shares_and_adapted_layers_make_up_all_weights_but_vectors():
    model = mixture()
    plan = weft.attach(model, weft.LoRA(r=2, targets=["q_proj"])).plan()
    frozen = sum(s.numbers for s in plan.left_out)
    norms = sum(p.numel() for n, p in model.named_parameters() if "norm" in n)
    assert frozen + norms + 2 * 16 * 16 == plan.base_parameters


def test_a_model_of_convolutions_is_refused_with_the_share():
    layers = [nn.Conv2d(64, 64, 3) for _ in range(3)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 8), nn.Linear(8, 2))
    with pytest.raises(weft.TargetError, match=r"leaves out 99.\d+ % .*convolution"):
        weft.attach(model, weft.LoRA(targets="all-linear"))
    weft.attach(model, weft.LoRA(targets=["4"]))  # named, so meant


def test_nothing_is_said_of_what_was_not_asked_for_or_is_never_meant():
    model = mixture()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weft.attach(model, weft.LoRA(r=2, targets="attention"))
        table = nn.Sequential(nn.Embedding(500, 8), nn.Linear(8, 8))
        weft.attach(table, weft.LoRA(r=2, targets="all-linear"))


def test_a_kind_that_can_be_named_says_how(monkeypatch):
    monkeypatch.setitem(left_out.NAMED, "experts", 'add "experts" to targets')
    with pytest.warns(UserWarning, match=r'experts \d.*\. add "experts" to targets\.$'):
        weft.attach(mixture(), weft.LoRA(r=2))
