"""AdaLoRA through peft's files both ways: logits, reached ranks, and what has no form there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from checkpoint_support import (
    GPT2,
    attached,
    close,
    config_of,
    edit_config,
    llama,
    logits,
    peft_of,
    peft_reads,
    peft_saves,
    quiet,
    refused,
    rewrite,
    tiny,
)

import weft
from support import awake, inputs, net

ON_NET = {"target_modules": ["layer", "mid"]}


def adalora(**changes: Any) -> peft.AdaLoraConfig:
    with quiet():
        return peft.AdaLoraConfig(
            **{"init_r": 3, "target_r": 2, "lora_alpha": 5, "total_step": 10, **changes}
        )


def pruned(model: Any, pattern: dict[str, list[bool]]) -> Any:
    """A peft model whose training has ended with this pattern, layer by layer."""
    config = model.peft_config["default"]
    config.rank_pattern = {f"{module}.lora_E.default": marks for module, marks in pattern.items()}
    model.base_model.rankallocator.mask_using_rank_pattern(
        model.base_model.model, config.rank_pattern
    )
    return model


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_what_weft_saves_peft_reads(kind, tmp_path):
    a = awake("AdaLoRA", kind)
    weft.save(a.model, tmp_path)
    theirs = peft_reads(net(kind), tmp_path, "fan_in_fan_out is set to")
    close(logits(theirs, a.x), logits(a.model, a.x), logits(net(kind), a.x))
    written = config_of(tmp_path)
    assert (
        written["peft_type"],
        written["init_r"],
        written["target_r"],
        written["total_step"],
    ) == ("ADALORA", 3, 2, 9)
    assert (written["tinit"], written["tfinal"]) == a.config.phases == (1, 3)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize(
    "pattern",
    [
        None,
        {"layer": [True, False, True], "mid": [True, True, True]},
        {"layer": [False, False, False], "mid": [False, True, True]},
    ],
    ids=str,
)
def test_what_peft_saves_weft_reads(kind, pattern, tmp_path):
    theirs = peft_of(
        net(kind), adalora(tinit=1, tfinal=3, deltaT=2, orth_reg_weight=0.2, beta1=0.7, **ON_NET)
    )
    if pattern:
        pruned(theirs, pattern)
    wanted = logits(theirs, inputs(kind))
    peft_saves(theirs, tmp_path / "peft")
    model = net(kind)
    adapter = weft.load(model, tmp_path / "peft")
    close(logits(model, inputs(kind)), wanted, logits(net(kind), inputs(kind)))
    config = adapter.config
    assert (config.r, config.target_r, config.total_steps, config.phases) == (3, 2, 10, (1, 3))
    assert config.scale == pytest.approx(5 / (3 + 1e-5), rel=1e-12)
    assert (config.interval, config.orthogonality, config.beta1, config.beta2) == (
        2,
        0.2,
        0.7,
        0.85,
    )
    assert adapter.ranks == {
        m: sum(marks) for m, marks in (pattern or dict.fromkeys(("layer", "mid"), [1] * 3)).items()
    }
    assert ("cannot return" in str(adapter.load_report)) == bool(pattern)
    weft.save(model, tmp_path / "weft")
    again = net(kind)
    assert weft.load(again, tmp_path / "weft").ranks == adapter.ranks
    assert torch.equal(logits(again, inputs(kind)), logits(model, inputs(kind)))
    back = peft_reads(net(kind), tmp_path / "weft", "fan_in_fan_out is set to")
    close(logits(back, inputs(kind)), wanted, logits(net(kind), inputs(kind)))


@pytest.mark.parametrize("build", [lambda: tiny("GPT2LMHeadModel", "GPT2Config", **GPT2), llama])
def test_language_models_there_and_back(build, tmp_path):
    model = build()
    attached(model, weft.AdaLoRA(r=3, alpha=5, targets="all-linear", total_steps=50))
    weft.save(model, tmp_path / "one")
    theirs = peft_reads(build(), tmp_path / "one", "fan_in_fan_out is set to")
    close(logits(theirs), logits(model), logits(build()))
    mine = build()
    assert weft.load(mine, peft_saves(theirs, tmp_path / "two")).config.alpha == 5
    close(logits(mine), logits(model), logits(build()))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("embedding", {}),
        ("linear", {"targets": {"layer": {"r": 2}, "mid": {}}}),
        ("linear", {"targets": {"layer": {"alpha": 2.0}, "mid": {}}}),
    ],
)
def test_what_peft_has_no_form_for_is_saved_in_weft_s_own(kind, changes, tmp_path):
    a = awake("AdaLoRA", kind, **changes)
    weft.save(a.model, tmp_path)
    assert config_of(tmp_path)["peft_type"] == "WEFT_ADALORA"
    model = net(kind)
    weft.load(model, tmp_path)
    assert torch.equal(logits(model, a.x), logits(a.model, a.x))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"rank_pattern": {"layer.lora_E": [True]}}, "have 3 marks, one per triplet"),
        ({"rank_pattern": {"layer": [True] * 3}}, "name a lora_E"),
        ({"rank_pattern": {"layer.lora_E": "101"}}, "values are a list"),
        ({"rank_pattern": [1]}, "rank_pattern must be a mapping"),
        ({"init_r": 0}, "1 or more"),
        ({"total_step": 0}, "total_steps"),
    ],
)
def test_a_configuration_that_cannot_be_meant(changes, text, tmp_path):
    directory = peft_saves(peft_of(net(), adalora(**ON_NET)), tmp_path / "a")
    edit_config(directory, **changes)
    refused(net(), directory, text)


def test_a_tensor_that_does_not_fit_the_pattern(tmp_path):
    directory = peft_saves(
        pruned(
            peft_of(net(), adalora(**ON_NET)), {"layer": [True, False, True], "mid": [True] * 3}
        ),
        Path(tmp_path / "a"),
    )
    rewrite(
        directory,
        lambda t: t.update({k: v[:1].clone() for k, v in t.items() if "layer.lora_A" in k}),
    )
    refused(net(), directory, "layer.lora_A", "[1, 7] in the file, [3, 7] expected")


def test_fields_that_a_file_leaves_out_have_peft_s_meaning(tmp_path):
    theirs = peft_of(net(), adalora(**ON_NET, target_r=8, lora_alpha=0))
    directory = peft_saves(theirs, tmp_path / "a")
    edit_config(directory, tinit=None, tfinal=None, beta1=None)
    model = net()
    config = weft.load(model, directory).config
    assert (config.phases, config.beta1, config.final_r) == ((0, 0), 0.85, 3)
    assert config.scale == pytest.approx(3 / (3 + 1e-5), rel=1e-12)  # an alpha of 0 means r


def test_a_schedule_that_nobody_has_set_is_written_as_one_that_peft_takes(tmp_path):
    a = awake("AdaLoRA", total_steps=None)
    weft.save(a.model, tmp_path)
    written = config_of(tmp_path)
    assert (written["total_step"], written["tinit"], written["tfinal"]) == (1, 0, 0)
    close(logits(peft_reads(net(), tmp_path), a.x), logits(a.model, a.x), logits(net(), a.x))
    assert weft.load(net(), tmp_path).config.total_steps is None
