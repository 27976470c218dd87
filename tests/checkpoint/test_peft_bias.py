"""peft's bias="all" and bias="lora_only", both ways: logits, keys, and what is missing or left over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_support import (
    GPT2,
    attached,
    classifier,
    close,
    config_of,
    edit_config,
    llama,
    logits,
    peft_of,
    peft_reads,
    peft_saves,
    quiet,
    read,
    refused,
    rewrite,
    tiny,
)
from peft import LoraConfig, PeftModel

import weft
from support import net

BASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "net": (net, {"target_modules": ["layer", "mid"]}),
    "llama": (
        lambda: llama(attention_bias=True, mlp_bias=True),
        {"target_modules": ["q_proj", "down_proj"]},
    ),
    "gpt2": (
        lambda: tiny("GPT2LMHeadModel", "GPT2Config", **GPT2),
        {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
    ),
    "bert": (
        lambda: classifier("bert"),
        {"target_modules": ["query"], "modules_to_save": ["classifier"]},
    ),
}
each_base = pytest.mark.parametrize("base", list(BASES))
each_bias = pytest.mark.parametrize("bias", ["all", "lora_only"])
each_method = pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])


def inputs_of(base: str) -> Any:
    return torch.randn(5, 7, generator=torch.Generator().manual_seed(1)) if base == "net" else None


def saved_by_peft(base: str, bias: str, folder: Path, **changes: Any) -> Any:
    build, known = BASES[base]
    with quiet():
        config = LoraConfig(r=3, lora_alpha=5, bias=bias, **{**known, **changes})
    theirs = peft_of(build(), config)
    peft_saves(theirs, folder)
    return theirs


def biases(folder: Path) -> dict[str, torch.Tensor]:
    return {key: t for key, t in read(folder)[0].items() if key.endswith(".bias")}


@each_base
@each_bias
@each_method
def test_what_peft_trained_weft_reads_and_writes_for_peft(base, bias, dora, tmp_path):
    build, x = BASES[base][0], inputs_of(base)
    theirs = saved_by_peft(base, bias, tmp_path / "peft", use_dora=dora)
    mine = build().eval()
    adapter = weft.load(mine, tmp_path / "peft")
    close(logits(mine, x), logits(theirs, x), logits(build(), x))
    assert type(adapter.config) is (weft.DoRA if dora else weft.LoRA)
    trained = {n for n, p in theirs.named_parameters() if p.requires_grad and n.endswith(".bias")}
    assert len([n for n in adapter.selected if n.endswith("bias")]) == len(trained)

    weft.save(mine, tmp_path / "weft")
    again = build().eval()
    weft.load(again, tmp_path / "weft")
    assert torch.equal(logits(again, x), logits(mine, x))
    assert config_of(tmp_path / "weft")["bias"] == bias
    back = peft_reads(build(), tmp_path / "weft", "fan_in_fan_out is set to")
    close(logits(back, x), logits(theirs, x), logits(build(), x))
    written, wanted = biases(tmp_path / "weft"), biases(tmp_path / "peft")
    repeats = {key for key in wanted if ".original_module." in key or ".modules_to_save." in key}
    assert written.keys() == wanted.keys() - repeats
    assert all(torch.equal(written[key], wanted[key]) for key in written)


@each_bias
def test_the_base_is_the_base_again_after_detaching(bias, tmp_path):
    saved_by_peft("llama", bias, tmp_path)
    model = BASES["llama"][0]().eval()
    before = logits(model)
    weft.load(model, tmp_path)
    weft.detach(model)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    ("bias", "key"),
    [
        ("all", "layers.1.self_attn.k_proj.bias"),
        ("all", "layers.1.self_attn.q_proj.base_layer.bias"),
        ("lora_only", "layers.1.self_attn.q_proj.base_layer.bias"),
    ],
)
def test_a_missing_bias_is_an_error(bias, key, tmp_path):
    """In a file of peft, and in the same file of Weft."""
    build = BASES["llama"][0]
    saved_by_peft("llama", bias, tmp_path / "peft")
    model = build()
    weft.load(model, tmp_path / "peft")
    weft.save(model, tmp_path / "weft")
    for folder in (tmp_path / "peft", tmp_path / "weft"):
        rewrite(folder, lambda t: t.pop(f"base_model.model.model.{key}"))
        refused(build(), folder, "missing", key.replace("base_layer.", ""))


def test_no_bias_at_all_in_the_file_is_an_error(tmp_path):
    saved_by_peft("net", "none", tmp_path)
    edit_config(tmp_path, bias="lora_only")
    refused(net(), tmp_path, "missing", "'layer.bias'", "'mid.bias'", "its bias field")
    edit_config(tmp_path, bias="all")
    refused(net(), tmp_path, "missing", "'layer.bias'", "'mid.bias'", "'head.bias'")


def test_a_bias_that_the_field_does_not_name_is_extra(tmp_path):
    saved_by_peft("net", "all", tmp_path)
    edit_config(tmp_path, bias="lora_only")
    refused(net(), tmp_path, "extra", "head.bias")
    edit_config(tmp_path, bias="some")
    refused(net(), tmp_path, "bias='some'", "lora_only")


def test_a_model_without_biases_has_none_to_miss(tmp_path):
    with quiet():
        config = LoraConfig(r=2, bias="all", target_modules=["q_proj"])
    theirs = peft_of(llama(), config)
    peft_saves(theirs, tmp_path)
    model = llama()
    assert not weft.load(model, tmp_path).selected
    close(logits(model), logits(theirs), logits(llama()))


def test_a_repeated_bias_of_a_saved_module_that_differs_is_refused(tmp_path):
    saved_by_peft("bert", "all", tmp_path)
    key = "base_model.model.classifier.modules_to_save.bias"
    rewrite(tmp_path, lambda t: t[key].add_(1))
    refused(classifier("bert"), tmp_path, "classifier.modules_to_save.bias")


def test_biases_go_along_on_export_to_peft(tmp_path):
    theirs = saved_by_peft("net", "all", tmp_path / "a")
    model, x = net().eval(), inputs_of("net")
    weft.load(model, tmp_path / "a")
    weft.save(model, tmp_path / "b")
    weft.export(tmp_path / "b", "peft", tmp_path / "c")
    close(logits(peft_reads(net(), tmp_path / "c"), x), logits(theirs, x), logits(net(), x))


@each_base
@each_bias
@each_method
def test_what_weft_trained_peft_reads(base, bias, dora, tmp_path):
    build, known = BASES[base]
    x, method = inputs_of(base), weft.DoRA if dora else weft.LoRA
    model = build().eval()
    config = method(
        r=3,
        targets=known["target_modules"],
        modules_to_save=known.get("modules_to_save", ()),
        train=["biases" if bias == "all" else "target-biases"],
    )
    adapter = attached(model, config)
    assert any(name.endswith("bias") for name in adapter.selected)
    weft.save(model, tmp_path)
    assert config_of(tmp_path)["bias"] == bias
    theirs = peft_reads(build(), tmp_path, "fan_in_fan_out is set to")
    close(logits(theirs, x), logits(model, x), logits(build(), x))
    again = build().eval()
    assert weft.load(again, tmp_path).config == adapter.config
    assert torch.equal(logits(again, x), logits(model, x))


@pytest.mark.parametrize(("bias", "words"), [("all", ("biases",)), ("lora_only", None)])
def test_the_field_of_peft_is_train_in_the_configuration(bias, words, tmp_path):
    saved_by_peft("llama", bias, tmp_path / "a")
    wanted = words or ("target-biases",)
    assert tuple(weft.inspect(tmp_path / "a").config["train"]) == wanted
    model = BASES["llama"][0]()
    adapter = weft.load(model, tmp_path / "a")
    assert adapter.config.train == wanted
    fresh = weft.attach(BASES["llama"][0](), adapter.config)
    assert set(fresh.selected) == set(adapter.selected)


def test_the_bias_of_the_head_is_named_in_train(tmp_path):
    """peft's "all" trains it, and "biases" leaves the head alone."""
    saved_by_peft("net", "all", tmp_path)
    adapter = weft.load(net(), tmp_path)
    assert adapter.config.train == ("biases", "head.bias")
    fresh = weft.attach(net(), adapter.config)
    assert set(fresh.selected) == set(adapter.selected)


@pytest.mark.parametrize("train", [["norms"], ["last:1"], ["biases", "norms"], ["k_proj.bias"]])
@each_method
def test_a_selection_that_peft_has_no_field_for_makes_peft_refuse(train, dora, tmp_path):
    build = BASES["llama"][0]
    model = build().eval()
    attached(
        model, (weft.DoRA if dora else weft.LoRA)(r=2, targets=r".*layers\.0.*q_proj", train=train)
    )
    weft.save(model, tmp_path / "a")
    assert config_of(tmp_path / "a")["peft_type"] == ("WEFT_DORA" if dora else "WEFT_LORA")
    assert not weft.inspect(tmp_path / "a").readable_by_peft
    again = build().eval()
    weft.load(again, tmp_path / "a")
    assert torch.equal(logits(again), logits(model))
    with pytest.raises((KeyError, ValueError)), quiet():
        PeftModel.from_pretrained(build(), str(tmp_path / "a"))
    with pytest.raises(weft.UnsupportedError, match="peft trains all biases or those of the"):
        weft.export(tmp_path / "a", "peft", tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("method", ["VeRA", "AdaLoRA", "LoRAFA", "DyLoRA"])
def test_other_methods_with_biases_have_wefts_own_format(method, tmp_path):
    model = net().eval()
    config = getattr(weft, method)(r=3, targets=["layer"], train=["target-biases"])
    attached(model, config)
    weft.save(model, tmp_path / "a")
    again, x = net().eval(), inputs_of("net")
    weft.load(again, tmp_path / "a")
    assert torch.equal(logits(again, x), logits(model, x))
    assert not weft.inspect(tmp_path / "a").readable_by_peft
    weft.export(tmp_path / "a", "lora", tmp_path / "b")  # the biases go along
    close(logits(peft_reads(net(), tmp_path / "b"), x), logits(model, x), logits(net(), x))
    if method == "VeRA":
        with pytest.raises(
            weft.UnsupportedError, match=r"no form for the base tensor 'layer\.bias'"
        ):
            weft.save(model, tmp_path / "c", projections=True)
