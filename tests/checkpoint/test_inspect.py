"""`weft.inspect`: what a directory is, in text that fits a terminal and in JSON; checked, without a
model.
"""

from __future__ import annotations

import json

import pytest
import torch
from checkpoint_support import TENSORS, attached, edit_config, llama, peft_file, rewrite
from torch import nn

import weft
from support import KINDS, SAVED_AS_TRAINED, awake, config, net
from weft.methods import METHODS

LONG = "a-folder-with-a-name-of-some-length/" * 5 + "without.any.blank" * 8


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", SAVED_AS_TRAINED)
def test_text_and_json_say_what_was_saved(variant, kind, tmp_path):
    a = awake(variant, kind, modules_to_save=["head"])
    weft.save(a.model, tmp_path)
    found = weft.inspect(tmp_path)
    method = variant.partition(":")[0]
    assert (found.method, found.writer, found.numbers) == (method, "weft", a.adapter.num_parameters)
    assert found.nbytes == a.adapter.nbytes == (tmp_path / TENSORS).stat().st_size
    assert found.readable_by_peft == (
        method in ("LoRA", "DoRA") or (method == "AdaLoRA" and kind != "embedding")
    )
    assert found.base["class"] == "Net"
    assert {row.name: (row.kind, row.shape, row.trainable) for row in found.rows} == {
        row.name: (row.kind, row.shape, row.trainable) for row in a.adapter.plan().rows
    }
    data = json.loads(json.dumps(found.to_json()))
    assert data["schema"] == 1
    assert sum(row["trainable"] for row in data["rows"]) == data["numbers"] == found.numbers
    assert weft.methods.from_json(data["config"]) == a.config
    text = str(found)
    for said in (method, f"{found.numbers:,} trained numbers", "head", "base: Net"):
        assert said in text


def lines_fit(text: str) -> None:
    long = [line for line in text.splitlines() if len(line) > 80]
    assert not long, "\n".join(long)


@pytest.mark.parametrize("method", METHODS)
def test_the_text_is_at_most_80_columns_wide(method, tmp_path):
    model = llama(3, attention_bias=True)
    targets = {
        r"model\.layers\.\d+\.self_attn\.(q_proj|k_proj|v_proj|o_proj)": {"seed": 5},
        "gate_proj": {},
        "a" * 90 + "|.*down_proj": {},
    }
    attached(model, config(method, targets=targets, modules_to_save=["lm_head", "input_layernorm"]))
    weft.save(model, tmp_path / LONG)
    text = str(weft.inspect(tmp_path / LONG))
    lines_fit(text)
    assert (
        "".join(line.strip() for line in text.splitlines()).count(str(tmp_path / LONG)) == 1
    )  # whole, over several lines
    names = "|".join(f"name_{i}_of_a_layer" for i in range(9))
    lines_fit(str(weft.inspect(peft_file(tmp_path / "peft", target_modules=f"{names}|.*mid"))))


@pytest.mark.parametrize("method", ["LoRA", "DoRA", "VeRA"])
def test_a_directory_of_peft(method, tmp_path):
    found = weft.inspect(peft_file(tmp_path, method))
    adapter = weft.load(net(), tmp_path)
    assert (found.method, found.writer, found.readable_by_peft) == (method, "peft", True)
    assert found.numbers == adapter.num_parameters == sum(row.trainable for row in found.rows)
    assert found.base == {"class": "Net", "library": "support"}
    shapes = {row.name: row.shape for row in found.rows}
    assert shapes == (
        {"layer": (11,), "mid": (9,)} if method == "VeRA" else {"layer": (11, 7), "mid": (9, 11)}
    )
    lines_fit(str(found))
    json.dumps(found.to_json())


def test_notes_are_told(tmp_path):
    directory = peft_file(tmp_path)
    rewrite(directory, lambda t: [t.update({"module." + k: t.pop(k)}) for k in list(t)])
    text = str(weft.inspect(directory))
    assert "note: module.base_model.model.* in the file is * in the model" in text.replace(
        "\n    ", " "
    )
    lines_fit(text)


def test_a_model_without_a_class_name_of_its_own(tmp_path):
    model = nn.Sequential(nn.Linear(7, 5))
    attached(model, weft.LoRA(r=2, targets=["0"]))
    weft.save(model, tmp_path)
    assert "base: Sequential" in str(weft.inspect(tmp_path))


def test_what_load_refuses_inspect_refuses(tmp_path):
    a = awake("DVoRA")
    weft.save(a.model, tmp_path / "a")
    with pytest.raises(weft.CheckpointError, match="does not exist"):
        weft.inspect(tmp_path / "nowhere")
    rewrite(tmp_path / "a", lambda t: t.update({k: v + 1 for k, v in t.items()}))
    with pytest.raises(weft.CheckpointError, match="checksum"):
        weft.inspect(tmp_path / "a")
    directory = peft_file(tmp_path / "b")
    edit_config(directory, lora_bias=True)
    with pytest.raises(weft.UnsupportedError, match="lora_bias=True"):
        weft.inspect(directory)
    edit_config(directory, lora_bias=False)
    rewrite(directory, lambda t: t.update({"odd": torch.ones(2)}))
    with pytest.raises(weft.CheckpointError, match="'odd'"):
        weft.inspect(directory)
