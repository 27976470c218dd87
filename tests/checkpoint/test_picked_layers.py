"""`exclude`, `within` and `layers` in files, ours and those of peft."""

import json

import peft
import pytest
from checkpoint_support import (
    attached,
    llama,
    logits,
    peft_of,
    peft_reads,
    peft_saves,
    refused,
    rewrite,
)

import weft
from weft.checkpoint.formats.peft_picks import adapted_by
from weft.model.structure import Structure


@pytest.mark.parametrize("method", [weft.LoRA, weft.DoRA, weft.VeRA])
def test_files_in_both_directions(method, tmp_path):
    """Saved, loaded and saved again; peft adapts the same layers and gives the same logits."""
    model = llama()
    asked = method(r=4, layers=[1], exclude=["v_proj", "mlp"])
    adapter = attached(model, asked)
    names = [f"model.layers.1.self_attn.{n}_proj" for n in "qko"]
    assert list(adapter.layers) == names
    weft.save(model, tmp_path / "a", projections=method is weft.VeRA)
    again = llama()
    loaded = weft.load(again, tmp_path / "a")
    assert loaded.config == asked and list(loaded.layers) == names
    assert (logits(again) - logits(model)).abs().max() == 0
    theirs = peft_reads(llama(), tmp_path / "a")
    assert (logits(theirs) - logits(model)).abs().max() < 1e-5


FIELDS = [
    {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
    {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
    {"target_modules": "all-linear", "exclude_modules": r".*(mlp|k_proj|layers.0).*"},
]


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_a_layer_that_peft_picked_and_the_file_lacks_is_named(fields, tmp_path):
    """The fields say which layers there were, so one that was taken out of the file is missed."""
    theirs = peft_of(llama(), peft.LoraConfig(r=3, **fields))
    mine = llama()
    peft_saves(theirs, tmp_path)
    weft.load(mine, tmp_path)
    assert (logits(mine) - logits(theirs)).abs().max() < 1e-5
    lost = ".layers.1.self_attn.q_proj."

    def lose(tensors):
        for key in [key for key in tensors if lost in key]:
            del tensors[key]

    rewrite(tmp_path, lose)
    refused(llama(), tmp_path, "missing: ", "layers.1.self_attn.q_proj")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"exclude_modules": r"(.*)+\1!"}, "exclude_modules: .* cannot be matched"),
        ({"target_modules": r"(.*)+\1!", "layers_to_transform": 1}, "target.*cannot be matched"),
        (
            {"layers_to_transform": 1, "layers_pattern": r"(.*)+\1!"},
            "layers_pattern: .* cannot be matched",
        ),
        ({"layers_to_transform": 1, "layers_pattern": "("}, "layers_pattern: .*cannot be matched"),
        ({"layers_to_transform": 1, "layers_pattern": 3}, "layers_pattern must be"),
        ({"layers_to_transform": [True]}, "layers_to_transform must be"),
        ({"exclude_modules": [3]}, "exclude_modules must be"),
    ],
    ids=str,
)
def test_a_file_whose_choice_cannot_be_followed_is_refused(fields, says, tmp_path):
    """...and no expression of a file keeps the reader busy for ever."""
    theirs = peft_of(llama(), peft.LoraConfig(r=3, target_modules=["q_proj", "up_proj"]))
    peft_saves(theirs, tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    with pytest.raises((weft.CheckpointError, weft.ConfigError), match=says):
        weft.load(llama(), tmp_path)


@pytest.mark.parametrize("pattern", ["layers", ["h", "layers"], "lay.*", None, "h"])
def test_names_of_stacks_are_those_of_peft(pattern):
    given = {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": pattern}
    ours = adapted_by(given)(Structure.of(llama()), ())
    try:
        theirs = peft_of(llama(), peft.LoraConfig(r=3, **given))
    except ValueError:  # peft finds none
        assert ours == []
        return
    wanted = {n for n, m in theirs.get_base_model().named_modules() if hasattr(m, "lora_A")}
    assert set(ours) == wanted and ours
