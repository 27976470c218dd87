"""Files of adapters on fused experts: our own format, and peft's both ways."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

import moe
import weft
from support import config

pytestmark = pytest.mark.filterwarnings("ignore")  # peft's own
NAMES = list(moe.MODELS)


def _logits(model):
    with torch.no_grad():
        found = model(input_ids=moe.ids())
    return found.logits


def _trained(name, variant, **changes):
    model = moe.model(name)
    adapter = weft.attach(model, config(variant, **{"targets": "experts", **changes}))
    moe.move(adapter)
    return model, adapter


@pytest.mark.parametrize("variant", ["LoRA", "LoRA:init=pissa", "LoRAFA", "VeRA", "DoRA", "DVoRA"])
@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss", "llama4_text"])
def test_what_is_saved_is_loaded(tmp_path, name, variant):
    model, adapter = _trained(name, variant, targets=["all-linear", "experts"])
    wanted = _logits(model)
    adapter.save(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size == adapter.nbytes
    other = moe.model(name)
    report = weft.load(other, tmp_path)
    assert report.load_report.ok if hasattr(report, "load_report") else report.ok
    assert torch.equal(_logits(other), wanted)
    shown = weft.inspect(tmp_path)
    assert shown.numbers == adapter.num_parameters
    assert any(len(row.shape) == 3 for row in shown.rows)


@pytest.mark.parametrize("variant", ["LoRA", "LoRA:rslora=True", "LoRA:init=pissa"])
@pytest.mark.parametrize("name", NAMES)
def test_peft_reads_what_we_save(tmp_path, name, variant):
    overrides = {"gate_up_proj": {"r": 2}, "up_proj": {"r": 2}, "experts": {}}
    if name != "nemotron_h":
        overrides.pop("up_proj")
    else:
        overrides.pop("gate_up_proj")
    overrides["attention" if name == "deepseek_v3" else "all-linear"] = {}
    model, adapter = _trained(name, variant, targets=overrides, dropout=0.0)
    wanted = _logits(model)
    adapter.save(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
    theirs = PeftModel.from_pretrained(moe.model(name), tmp_path)
    assert (_logits(theirs) - wanted).abs().max() <= 2e-6 * wanted.abs().max()
    other = moe.model(name)
    weft.load(other, tmp_path)
    assert torch.equal(_logits(other), wanted)


def _of_peft(name, path, **fields):
    model = moe.model(name)
    first = "up_proj" if name == "nemotron_h" else "gate_up_proj"
    given = {
        "r": 3,
        "lora_alpha": 5,
        "target_modules": ["q_proj"],
        "target_parameters": [f"experts.{first}", "experts.down_proj"],
        "init_lora_weights": False,
    }
    theirs = get_peft_model(model, LoraConfig(**{**given, **fields}))
    with torch.no_grad():
        for n, p in theirs.named_parameters():
            if "lora_" in n:
                p.copy_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(n))))
    theirs.save_pretrained(path)
    return _logits(theirs)


@pytest.mark.parametrize("name", NAMES)
def test_we_read_what_peft_saves(tmp_path, name):
    modules = ["q_proj"] if name != "deepseek_v3" else ["q_a_proj"]
    wanted = _of_peft(name, tmp_path / "theirs", target_modules=modules)
    model = moe.model(name)
    weft.load(model, tmp_path / "theirs")
    assert (_logits(model) - wanted).abs().max() <= 2e-6 * wanted.abs().max()
    weft.save(model, tmp_path / "ours")
    again, back = load_file(tmp_path / "ours/adapter_model.safetensors"), moe.model(name)
    theirs = load_file(tmp_path / "theirs/adapter_model.safetensors")
    assert again.keys() == theirs.keys()
    assert all(torch.equal(again[key], t) for key, t in theirs.items())
    weft.load(back, tmp_path / "ours")
    assert torch.equal(_logits(back), _logits(model))


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": [], "target_parameters": ["experts.down_proj"]},
        {"target_modules": ["q_proj", "v_proj"], "target_parameters": ["experts.gate_up_proj"]},
        {"target_modules": ["o_proj"], "target_parameters": ["gate_up_proj", "down_proj"]},
        {"target_modules": [], "rank_pattern": {"experts.down_proj": 2}},
        {"target_modules": [], "alpha_pattern": {r"layers\.0.*gate_up_proj": 7}},
    ],
)
def test_we_read_parts_and_patterns(tmp_path, fields):
    wanted = _of_peft("mixtral", tmp_path, **fields)
    model = moe.model("mixtral")
    weft.load(model, tmp_path)
    assert (_logits(model) - wanted).abs().max() <= 2e-6 * wanted.abs().max()


def test_experts_that_a_file_of_peft_lacks_are_missed(tmp_path):
    _of_peft("mixtral", tmp_path, target_modules=[])
    with pytest.raises(weft.CheckpointError, match=r"layers\.2\.mlp\.experts\.down_proj"):
        weft.load(moe.model("mixtral", num_hidden_layers=3), tmp_path)


def test_a_file_without_experts_whose_names_they_share_is_read(tmp_path):
    wanted = _of_peft("aria_text", tmp_path, target_modules=["down_proj"], target_parameters=None)
    model = moe.model("aria_text")
    weft.load(model, tmp_path)
    assert (_logits(model) - wanted).abs().max() <= 2e-6 * wanted.abs().max()
    weft.save(model, tmp_path / "again")
    other = moe.model("aria_text")
    weft.load(other, tmp_path / "again")
    assert torch.equal(_logits(other), _logits(model))


def test_peft_does_not_get_layers_that_it_takes_for_experts(tmp_path):
    """With transformers 5, peft adapts the experts of a DeepSeek where a file names "down_proj"."""
    model, adapter = _trained("deepseek_v3", "LoRA", targets=["shared_experts.down_proj"])
    wanted = _logits(model)
    adapter.save(tmp_path)
    assert not weft.inspect(tmp_path).readable_by_peft
    with pytest.raises(weft.UnsupportedError, match=r"down_proj' of a deepseek_v3 for fused exp"):
        weft.export(tmp_path, "peft", tmp_path / "out")
    weft.load(other := moe.model("deepseek_v3"), tmp_path)
    assert torch.equal(_logits(other), wanted)


def test_what_peft_has_no_form_for_is_in_our_own(tmp_path):
    for number, given in enumerate(({"variant": "DoRA"}, {"variant": "LoRA", "dropout": 0.1})):
        _, adapter = _trained("mixtral", **given)
        adapter.save(tmp_path / str(number))
        assert not weft.inspect(tmp_path / str(number)).readable_by_peft
    with pytest.raises(weft.UnsupportedError, match=r"fused experts|magnitude"):
        weft.export(tmp_path / "0", "peft", tmp_path / "out")


@pytest.mark.parametrize("variant", ["VeRA", "LoRAFA"])
def test_other_methods_become_lora_that_peft_reads(tmp_path, variant):
    model, adapter = _trained("qwen3_moe", variant, dropout=0.0)
    wanted = _logits(model)
    adapter.save(tmp_path / "own")
    weft.export(tmp_path / "own", "lora", tmp_path / "lora")
    theirs = PeftModel.from_pretrained(moe.model("qwen3_moe"), tmp_path / "lora")
    assert (_logits(theirs) - wanted).abs().max() <= 2e-6 * wanted.abs().max()
