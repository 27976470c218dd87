"""`weft plan --quantize` counts what the loaded model has."""

import json
from functools import partial

import pytest
import torch
import transformers

import weft
from weft.cli import main
from weft.model.memory import estimate
from weft.model.packings import packing_of, parts
from weft.tasks.quantize import QUANTIZE, loading_options


def nbytes(tensors):
    return sum(p.numel() * p.element_size() for t in tensors for p in parts(t))


def saved(folder, kind):
    """Widths that blocks of 64 do not divide, a tied head, biases; GPT-2's layers are Conv1D."""
    torch.manual_seed(0)
    model = (
        transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=41,
                hidden_size=72,
                intermediate_size=88,
                num_hidden_layers=2,
                num_attention_heads=2,
                attention_bias=True,
                tie_word_embeddings=True,
            )
        )
        if kind == "llama"
        else transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=41, n_embd=24, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2
            )
        )
    )
    model.save_pretrained(folder)
    return model


def plan(folder, *words):
    said = ["plan", "--model", str(folder), "--method", "dora", "--dtype", "float32", *words]
    assert main([*said, "--json", str(folder / "plan.json")]) == 0
    return json.loads((folder / "plan.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("quantize", QUANTIZE)
def test_the_bytes_of_a_plan_are_those_of_the_loaded_model(tmp_path, capsys, quantize, kind):
    pytest.importorskip(QUANTIZE[quantize])
    dense = saved(tmp_path, kind)
    found = plan(tmp_path, "--quantize", quantize)["memory"]
    make = partial(transformers.AutoModelForCausalLM.from_config)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, **loading_options(quantize, "float32", dense.config, make)
    )
    layers = [m for m in model.modules() if packing_of(m) is not None]
    if not layers:  # torchao packs nn.Linear alone
        assert (kind, QUANTIZE[quantize], found["codes"]) == ("gpt2", "torchao", 0)
        return
    tensors = [packing_of(m).tensors(m) for m in layers]
    assert found["codes"] == nbytes(parts(t[0])[0] for t in tensors)
    assert found["codes"] + found["scales"] == sum(map(nbytes, tensors))
    unpacked = [packing_of(m).weight(m) for m in layers]
    assert found["unpacked"] == max(W.numel() * W.element_size() for W in unpacked)
    live = estimate(weft.attach(model, weft.DoRA()))
    assert all(
        getattr(live, k) == found[k] for k in ("base", "codes", "scales", "unpacked", "trained")
    )
    whole = estimate(weft.attach(dense, weft.DoRA()))
    assert live.total - live.base - live.unpacked == whole.total - whole.base
    said = capsys.readouterr().out
    assert " scales" in said and " one unpacked" in said and quantize in said


def test_files_that_are_quantised_are_counted_so_or_it_is_said(tmp_path, capsys):
    model = saved(tmp_path, "llama")
    written = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))

    def with_files(found):
        config = json.dumps({**written, "quantization_config": found})
        (tmp_path / "config.json").write_text(config, encoding="utf-8")
        return plan(tmp_path)["memory"], capsys.readouterr().out

    asked = plan(tmp_path, "--quantize", "nf4")["memory"]
    bits = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    found, _ = with_files(bits)
    assert found == asked and found["quantize"] == "nf4"
    dense = sum(p.numel() * 4 for p in model.parameters())
    for name, said in (("gptq", "Weft cannot unpack them"), ("hqq", "as if they were not")):
        found, out = with_files({"quant_method": name, "bits": 4})
        assert found["base"] == dense and found["quantize"] is None
        assert f"quantised by {name}" in out and said in " ".join(out.split())
