"""`weft train` over a base that is quantised while it loads."""

import copy

import pytest
import tiny
import torch
import transformers

import weft
from weft.cli import main
from weft.errors import ConfigError
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
