"""`weft train` over a base that is quantised while it loads."""

import copy
import shutil

import pytest
import tiny
import torch
import transformers

import weft
from weft.cli import main
from weft.errors import ConfigError
from weft.tasks.quantize import loading_options
from weft.training import from_dict, train
from weft.training.checks import check_packages


def config(folder, quantize, out="run", steps=4):
    return from_dict(
        {
            "out": str(folder / out),
            "model": {"path": str(folder / "lm"), "quantize": quantize},
            "method": {"name": "DoRA", "r": 2},
            "data": {"train": str(folder / "pairs.jsonl")},
            "optim": {"lr": 1e-2, "warm_up": 0},
            "train": {"steps": steps, "batch": 4, "device": "cpu"},
        }
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantised")
    tiny.language_model(folder / "lm")
    tiny.pairs(folder / "pairs.jsonl", 12)
    return folder


def test_an_unknown_kind_is_named(place):
    with pytest.raises(ConfigError, match=r"model\.quantize='nf5' is not one of nf4"):
        config(place, "nf5")


def test_a_missing_package_is_named_before_anything_loads(place, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"needs the package bitsandbytes.*pip install 'weft\[bases"
    ):
        check_packages(config(place, "nf4"))


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_a_run_over_packed_weights_fits_the_float_base(place, quantize):
    pytest.importorskip("bitsandbytes")
    out = train(config(place, quantize, out=f"run-{quantize}")).out
    base = transformers.AutoModelForCausalLM.from_pretrained(place / "lm")
    adapter = weft.load(base, f"{out}/adapter")
    assert len(adapter.layers) > 0
    assert any(
        bool(p.detach().any()) for name, p in adapter.named_parameters() if name.endswith("B")
    )


def test_the_trainer_of_transformers_takes_an_attached_model_and_no_bare_one(place, tmp_path):
    pytest.importorskip("bitsandbytes")
    quantised = transformers.AutoModelForCausalLM.from_pretrained(
        place / "lm",
        dtype=torch.float32,
        quantization_config=transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        ),
    )
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", max_steps=3, save_strategy="no"
    )
    weft.attach(quantised, weft.LoRA(r=2))
    ids = torch.arange(5, 13)
    data = [{"input_ids": ids, "labels": ids}] * 6
    transformers.Trainer(model=quantised, args=args, train_dataset=data).train()
    with pytest.warns(UserWarning, match="writes the whole model"):
        quantised.save_pretrained(tmp_path / "whole")  # no adapter of peft is looked for
    weft.detach(quantised)
    with pytest.raises(ValueError, match="purely quantized"):
        transformers.Trainer(model=quantised, args=copy.copy(args))


def test_loftq_needs_a_quantised_base_and_no_other_start(place):
    for changes, said in (
        ({"adapter": {"loftq": True}}, r"model\.quantize is not given"),
        ({"adapter": {"loftq": True, "start": "a"}}, "two starts"),
    ):
        data = {"out": "o", "model": {"path": "m"}, "method": {"name": "LoRA"}, **changes}
        with pytest.raises(ConfigError, match=said):
            from_dict({**data, "data": {"train": "x.jsonl"}})


def test_a_run_begins_with_what_quantisation_took(place):
    pytest.importorskip("bitsandbytes")
    run = from_dict(
        {
            "out": str(place / "loftq"),
            "model": {"path": str(place / "lm"), "quantize": "nf4"},
            "method": {"name": "LoRA", "r": 4},
            "adapter": {"loftq": True},
            "data": {"train": str(place / "pairs.jsonl")},
            "optim": {"lr": 1e-2, "warm_up": 0},
            "train": {"steps": 4, "batch": 4, "device": "cpu"},
        }
    )
    train(run)
    assert "LoftQ's start on" in (place / "loftq" / "run.json").read_text(encoding="utf-8")


def test_a_classifier_s_new_head_is_not_quantised(tmp_path):
    pytest.importorskip("bitsandbytes")
    tiny.encoder(tmp_path / "bert")
    tiny.labelled(tmp_path / "labelled.csv", 16)
    run = from_dict(
        {
            "out": str(tmp_path / "run"),
            "model": {"path": str(tmp_path / "bert"), "quantize": "nf4"},
            "method": {"name": "LoRA", "r": 2},
            "data": {"train": str(tmp_path / "labelled.csv")},
            "optim": {"lr": 1e-2, "warm_up": 0},
            "train": {"steps": 4, "batch": 4, "device": "cpu"},
        }
    )
    assert train(run).finished


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_generate_quantises_as_training_did(place, tmp_path, capsys, dtype):
    pytest.importorskip("bitsandbytes")
    data = {
        "out": str(tmp_path / "run"),
        "model": {"path": str(place / "lm"), "quantize": "nf4", "dtype": dtype},
        "method": {"name": "LoRA", "r": 4},
        "adapter": {"loftq": True},
        "data": {"train": str(place / "pairs.jsonl")},
        "optim": {"lr": 1e-2, "warm_up": 0},
        "train": {"steps": 4, "batch": 4, "device": "cpu"},
    }
    train(from_dict(data))
    words = ["generate", "--model", str(place / "lm"), "--adapter", str(tmp_path / "run")]
    words += ["--prompt", "a", "--max-new-tokens", "2"]
    assert main(words) == 1
    assert "LoftQ" in capsys.readouterr().err
    assert main([*words, "--quantize", "nf4", "--dtype", dtype]) == 0


def logits(model):
    for module in model.modules():  # bitsandbytes cannot pack so small a layer anew for the CPU
        module.support_avx512bf16_for_cpu = False
    with torch.no_grad():
        return model.eval()(torch.arange(5, 21)[None]).logits.float()


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_a_run_is_merged_into_a_dense_model_that_transformers_loads(place, tmp_path, capsys, dtype):
    pytest.importorskip("bitsandbytes")
    run = train(config(place, "nf4", out=f"run-merge-{dtype}")).out
    words = ["merge", "--model", str(place / "lm"), "--adapter", str(run), "--dtype", dtype]
    assert main([*words, "--out", str(tmp_path / "dense")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "are dense now" in said and "quantised as in the adapter's run: nf4" in said
    dense = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype="auto")
    assert not hasattr(dense.config, "quantization_config")
    assert all(
        p.dtype == (torch.float32 if dtype == "auto" else torch.bfloat16)
        for p in dense.parameters()
    )
    options = loading_options("nf4", "auto", dense.config, type(dense))
    quantised = transformers.AutoModelForCausalLM.from_pretrained(place / "lm", **options)
    base = logits(quantised)
    weft.load(quantised, f"{run}/adapter")
    wanted = logits(quantised)
    effect = float((wanted - base).abs().max())
    assert effect > 0
    error = float((logits(dense) - wanted).abs().max() / wanted.abs().max())
    assert error < (1e-5 if dtype == "auto" else 2e-2)


def test_which_weights_a_merge_means_is_said(place, tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    run = train(config(place, "nf4", out="run-onto")).out
    words = ["merge", "--model", str(place / "lm"), "--adapter", f"{run}/adapter"]
    assert main([*words, "--onto", str(place / "lm"), "--out", str(tmp_path / "onto")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "dense now" not in said and "saved on weights quantised as NF4" in said
    plain = transformers.AutoModelForCausalLM.from_pretrained(place / "lm")
    weft.load(plain, f"{run}/adapter")
    dense = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "onto")
    assert torch.allclose(logits(dense), logits(plain), atol=1e-5)
    alone = tmp_path / "alone"  # an adapter without its run
    shutil.copytree(f"{run}/adapter", alone)
    words[4] = str(alone)
    assert main([*words, "--out", str(tmp_path / "c")]) != 0
    said = " ".join(capsys.readouterr().err.split())
    assert "quantised as NF4" in said and "--quantize nf4" in said and "--onto" in said
    assert main([*words, "--quantize", "nf4", "--out", str(tmp_path / "c")]) == 0
    assert main([*words, "--quantize", "nf4", "--onto", "m", "--out", str(tmp_path / "d")]) != 0


def test_a_model_saved_with_some_layers_merged_loads_as_it_was(place, tmp_path):
    """Merged layers are dense and stay so; the other packed ones are packed."""
    pytest.importorskip("bitsandbytes")
    plain = transformers.AutoConfig.from_pretrained(place / "lm")
    options = loading_options("nf4", "auto", plain, transformers.AutoModelForCausalLM.from_config)
    model = transformers.AutoModelForCausalLM.from_pretrained(place / "lm", **options)
    adapter = weft.attach(model, weft.LoRA(r=2, targets=["q_proj"]))
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.1 * torch.randn_like(p))
    weft.merge(model)
    weft.detach(model, keep_merged=True)
    wanted = logits(model)
    model.save_pretrained(tmp_path / "mixed")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "mixed")
    assert torch.allclose(logits(again), wanted, atol=1e-5)
    kinds = {n.rpartition(".")[2]: type(m).__name__ for n, m in again.named_modules()}
    assert kinds["q_proj"] == "Linear" and kinds["k_proj"] == "Linear4bit"
