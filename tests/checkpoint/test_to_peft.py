"""What Weft saves, `PeftModel.from_pretrained` reads without a warning, and gives the same logits;
or it refuses.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_support import (
    CLASSIFIERS,
    GPT2,
    attached,
    classifier,
    close,
    config_of,
    llama,
    logits,
    peft_reads,
    peft_saves,
    quiet,
    tiny,
    untied_gpt2,
)
from torch import Tensor, nn

import weft
from support import KINDS, awake, net
from weft.methods import METHODS

# peft says this of a model with both kinds of layer, and sets it right layer by layer.
MIXED = "fan_in_fan_out is set to"


def same_logits(
    model: nn.Module,
    base: nn.Module,
    plain: nn.Module,
    folder: Path,
    x: Tensor | None = None,
    projections: bool = False,
    tolerance: float = 1e-5,
) -> Any:
    """Save `model`'s adapter, let peft read it into `base`, and compare; `plain` is the base's own
    output.
    """
    weft.save(model, folder, projections=projections)
    theirs = peft_reads(base, folder, MIXED)
    close(logits(theirs, x), logits(model, x), logits(plain, x), tolerance)
    return theirs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "variant", ["LoRA", "LoRA:rslora=True", "DoRA", "DoRA:rslora=True", "DoRA:norm_grad=exact"]
)
def test_lora_and_dora_on_every_kind_of_layer(variant, kind, tmp_path):
    a = awake(variant, kind)
    same_logits(a.model, net(kind), net(kind), tmp_path, a.x)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_vera_with_its_matrices(kind, tmp_path):
    a = awake("VeRA", kind)
    same_logits(a.model, net(kind), net(kind), tmp_path, a.x, projections=True)


@pytest.mark.parametrize("method", ["LoRA", "DoRA", "VeRA"])
def test_without_a_bias(method, tmp_path):
    a = awake(method, bias=False)
    same_logits(
        a.model, net(bias=False), net(bias=False), tmp_path, a.x, projections=method == "VeRA"
    )


@pytest.mark.parametrize("method", ["LoRA", "DoRA", "VeRA"])
def test_numbers_held_in_bfloat16(method, tmp_path):
    a = awake(method, held="bfloat16")
    same_logits(a.model, net(), net(), tmp_path, a.x, projections=method == "VeRA")


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("method", ["LoRA", "DoRA"])
def test_overrides_per_target(method, dropout, tmp_path):
    """Rank, alpha, rslora (through alpha) and start go into peft's patterns; dropout stays in our
    header.
    """
    targets = {"layer": {"r": 2, "alpha": 7, "dropout": dropout}, "mid": {"rslora": True}}
    a = awake(method, targets=targets)
    a.model.eval()
    weft.save(a.model, tmp_path)
    written = config_of(tmp_path)
    assert written["rank_pattern"] == {"^layer": 2}
    assert set(written["alpha_pattern"]) == {"^layer", "^mid"}
    same_logits(a.model, net(), net(), tmp_path, a.x)
    again = weft.load(net(), tmp_path)
    assert again.sites["layer"].method.dropout == dropout
    assert again.config == a.config


def test_overrides_where_rslora_is_the_rule_and_some_layers_are_not(tmp_path):
    a = awake("LoRA:rslora=True", targets={"layer": {"rslora": False}, "mid": {"r": 5}})
    same_logits(a.model, net(), net(), tmp_path, a.x)


def test_a_name_that_is_the_end_of_another(tmp_path):
    """rank_pattern of peft matches endings; ours are anchored, so `up` does not catch
    `block.up`.
    """

    def build() -> nn.Module:
        torch.manual_seed(0)
        inner = nn.ModuleDict({"up": nn.Linear(7, 7)})
        model = nn.ModuleDict({"up": nn.Linear(7, 7), "block": inner})
        model.forward = lambda x: inner["up"](torch.tanh(model["up"](x)))
        return model

    model = build()
    attached(model, weft.LoRA(r=3, alpha=5, targets={".*up": {}, "(up)": {"r": 2, "alpha": 9}}))
    x = torch.randn(4, 7)
    same_logits(model, build(), build(), tmp_path, x)


@pytest.mark.parametrize("method", ["LoRA", "DoRA", "VeRA"])
@pytest.mark.parametrize(
    "targets", ["all-linear", "attention", ["c_attn"], r".*h\.1\..*c_proj"], ids=str
)
def test_gpt2_whose_weights_lie_the_other_way_round(method, targets, tmp_path):
    """Among them a square one, which no shape check could save."""
    model, base, plain = (tiny("GPT2LMHeadModel", "GPT2Config", **GPT2) for _ in range(3))
    attached(
        model,
        getattr(weft, method)(r=3, targets=targets, **({} if method == "VeRA" else {"alpha": 5})),
    )
    same_logits(model, base, plain, tmp_path, projections=method == "VeRA")


@pytest.mark.parametrize("method", ["LoRA", "DoRA"])
@pytest.mark.parametrize(
    "targets", [["wte", "c_attn", "lm_head"], ["wte"], ["wte", "wpe"]], ids=str
)
def test_embeddings_conv1d_and_linear_in_one_model(method, targets, tmp_path):
    model = untied_gpt2()
    attached(model, getattr(weft, method)(r=3, alpha=5, targets=targets))
    same_logits(model, untied_gpt2(), untied_gpt2(), tmp_path)


@pytest.mark.parametrize("method", ["LoRA", "DoRA", "VeRA"])
def test_llama(method, tmp_path):
    model = llama(attention_bias=True, num_key_value_heads=1)
    attached(
        model,
        getattr(weft, method)(
            r=3, targets="all-linear", **({} if method == "VeRA" else {"alpha": 5})
        ),
    )
    base, plain = (llama(attention_bias=True, num_key_value_heads=1) for _ in range(2))
    theirs = same_logits(model, base, plain, tmp_path, projections=method == "VeRA")
    again = peft_saves(theirs, tmp_path / "again")
    mine = llama(attention_bias=True, num_key_value_heads=1)
    weft.load(mine, again)
    close(logits(mine), logits(model), logits(plain))


@pytest.mark.parametrize("method", ["LoRA", "DoRA", "VeRA"])
@pytest.mark.parametrize("which", CLASSIFIERS)
def test_a_classifier_head(which, method, tmp_path):
    """RoBERTa's head has a `dense` of its own; DistilBERT's "pre_classifier" ends in "classifier",
    so peft asks for it.
    """
    _, _, targets, head = CLASSIFIERS[which]
    model = classifier(which)
    made = {} if method == "VeRA" else {"alpha": 5}
    if "dense" in targets:
        targets = [r".*attention.*(query|dense)"]
    attached(model, getattr(weft, method)(r=3, targets=targets, modules_to_save=head, **made))
    theirs = same_logits(
        model, classifier(which), classifier(which), tmp_path, projections=method == "VeRA"
    )
    again = peft_saves(theirs, tmp_path / "again")
    mine = classifier(which)
    weft.load(mine, again)
    close(logits(mine), logits(model), logits(classifier(which)))
    weft.load(classifier(which), tmp_path)


def test_peft_gets_the_tensors_that_only_it_asks_for_from_the_base(tmp_path):
    """Saved while another adapter, which does train them, is active or merged."""
    model = classifier("distilbert")
    attached(
        model, weft.LoRA(r=3, alpha=5, targets=["q_lin"], modules_to_save=["classifier"]), "mine"
    )
    wanted = logits(model)
    attached(
        model,
        weft.LoRA(r=2, targets=["lin1"], modules_to_save=["pre_classifier", "classifier"]),
        "other",
        seed=7,
    )
    weft.save(model, tmp_path / "active", name="mine")
    weft.merge(model, "other")
    weft.save(model, tmp_path / "merged", name="mine")
    for folder in ("active", "merged"):
        theirs = peft_reads(classifier("distilbert"), tmp_path / folder)
        close(logits(theirs), wanted, logits(classifier("distilbert")))


class Normed(nn.Module):
    """A head with buffers, which peft wants in the file."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(7, 11)
        self.head = nn.Sequential(nn.BatchNorm1d(11), nn.Linear(11, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))


def normed() -> Normed:
    torch.manual_seed(0)
    model = Normed()
    model(torch.randn(9, 7))  # in training mode, so that the statistics are no longer 0 and 1
    return model.eval()


def test_a_head_with_buffers(tmp_path):
    model = normed()
    attached(model, weft.LoRA(r=3, alpha=5, targets=["body"], modules_to_save=["head"]))
    x = torch.randn(4, 7)
    same_logits(model, normed(), normed(), tmp_path, x)
    weft.load(normed(), tmp_path)
    other = normed()
    other.head[0].running_mean += 1
    with pytest.raises(weft.CheckpointError, match=r"'head.0.running_mean' is a buffer"):
        weft.load(other, tmp_path)


@pytest.mark.parametrize("targets", [["mid"], "layer", r"(layer|mid)", {"mid": {"r": 2}}], ids=str)
def test_the_targets_are_those_that_were_adapted(targets, tmp_path):
    a = awake("LoRA", targets=targets)
    theirs = same_logits(a.model, net(), net(), tmp_path, a.x)
    adapted = {
        n.removeprefix("base_model.model.")
        for n, m in theirs.named_modules()
        if hasattr(m, "lora_A")
    }
    assert adapted == set(a.adapter.sites)


@pytest.mark.parametrize(
    "method", [name for name in METHODS if name not in ("LoRA", "DoRA", "AdaLoRA")]
)
def test_peft_refuses_what_it_has_no_form_for(method, tmp_path):
    import peft

    a = awake(method)
    weft.save(a.model, tmp_path)
    assert config_of(tmp_path)["peft_type"] == f"WEFT_{method.upper()}"
    with quiet(), pytest.raises((KeyError, ValueError)) as caught:
        peft.PeftModel.from_pretrained(net(variant=method), str(tmp_path))
    assert f"WEFT_{method.upper()}" in str(caught.value)


def test_vera_that_peft_has_no_form_for_is_refused_with_the_reason(tmp_path):
    for kind, changes, text in (
        ("embedding", {}, "no form for the embedding 'layer'"),
        ("linear", {"targets": {"layer": {"r": 2}, "mid": {}}}, "'layer' has r=2"),
        ("linear", {"targets": {"layer": {"seed": 4}, "mid": {}}}, "'layer' has seed=4"),
    ):
        a = awake("VeRA", kind, **changes)
        with pytest.raises(weft.UnsupportedError, match=text):
            weft.save(a.model, tmp_path, projections=True)
        weft.save(a.model, tmp_path / "small")


def test_matrices_that_peft_drew_go_back_to_peft(tmp_path):
    """draw="peft" and draw="stored" survive a round through Weft."""
    a = awake("VeRA", draw="peft")
    same_logits(a.model, net(), net(), tmp_path / "one", a.x, projections=True)
    weft.save(a.model, tmp_path / "two")
    assert weft.load(net(), tmp_path / "two").config.draw == "peft"
