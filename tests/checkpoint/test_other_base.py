"""An adapter that was made for another base is refused: another shape, depth, kind of layer or
architecture.
"""

from __future__ import annotations

import pytest
import torch
from checkpoint_support import (
    attached,
    config_of,
    llama,
    peft_of,
    peft_saves,
    refused,
    rewrite,
    tiny,
)

import weft
from support import SELECTIONS, awake, net
from weft.methods import METHODS


@pytest.mark.parametrize("method", METHODS)
def test_another_base_by_shape(method, tmp_path):
    a = awake(method)
    weft.save(a.model, tmp_path)
    other = net(variant=method)
    other.mid, other.head = torch.nn.Linear(11, 8), torch.nn.Linear(8, 4)
    if "body" in other._modules:
        import transformers

        small = {
            "n_embd": 10,
            "n_layer": 2,
            "n_head": 1,
            "bos_token_id": None,
            "eos_token_id": None,
            "vocab_size": 3,
        }
        other.layer, other.mid = torch.nn.Linear(7, 10), torch.nn.Linear(10, 8)
        other.body = transformers.GPT2Model(transformers.GPT2Config(**small)).eval()
        refused(other, tmp_path, "'body", "[11, 11]", "[10, 10]", x=a.x)
        return
    names = {
        "Head": ["head.weight", "[5, 9]", "[4, 8]"],
        "BitFit": ["mid.bias", "[9]", "[8]"],
        "Full": ["mid.weight", "[9, 11]", "[8, 11]"],
        "TopLayers": ["mid.weight", "[9, 11]", "[8, 11]"],
    }
    refused(other, tmp_path, *names.get(method, ["'mid'", "[9, 11]", "[8, 11]"]), x=a.x)


def test_another_base_by_kind_of_layer(tmp_path):
    a = awake("LoRA", "embedding")
    weft.save(a.model, tmp_path)
    refused(
        net("linear"), tmp_path, "'layer' is a embedding layer [11, 7]", "a linear layer [11, 7]"
    )
    weft.save(awake("LoRA", "linear").model, tmp_path)
    refused(net("embedding"), tmp_path, "'layer' is a linear layer", "a embedding layer")


def test_another_base_by_class_where_there_is_no_more_to_go_by(tmp_path):
    a = awake("LoRA")
    weft.save(a.model, tmp_path)

    class Other(type(a.model)):
        pass

    refused(Other(), tmp_path, "the adapter is for Net, and this model is Other")


def test_a_layer_of_another_class_in_its_place(tmp_path):
    a = awake("LoRA")
    weft.save(a.model, tmp_path)
    other = net()
    other.mid = torch.nn.Sequential(torch.nn.Linear(11, 9))
    refused(other, tmp_path, "'mid', a Sequential, cannot be adapted", x=a.x)


LLAMA = {
    "LoRA": {"r": 3, "alpha": 5},
    "VeRA": {"r": 5},
    "DVoRA": {"r": 5},
    "DoRA": {"r": 3, "alpha": 5},
}


@pytest.mark.parametrize("method", LLAMA)
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]], ids=["all", "named"])
def test_another_number_of_layers(method, targets, tmp_path):
    four = llama(4)
    attached(four, getattr(weft, method)(targets=targets, **LLAMA[method]))
    weft.save(four, tmp_path / "four")
    refused(
        llama(2),
        tmp_path / "four",
        "no module 'model.layers.2.self_attn.q_proj'",
        "nearest in the model: [",
    )
    two = llama(2)
    attached(two, getattr(weft, method)(targets=targets, **LLAMA[method]))
    weft.save(two, tmp_path / "two")
    refused(llama(4), tmp_path / "two", "nothing for 'model.layers.2.self_attn.q_proj'")
    for compiled in (2, 4):  # names that had to be mapped are no reason not to count
        model = llama(4)
        model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
        if compiled == 2:
            refused(model, tmp_path / "two", "nothing for 'model.layers.2.self_attn.q_proj'")
        else:
            assert weft.load(model, tmp_path / "four").load_report.mapped


@pytest.mark.parametrize("method", SELECTIONS)
def test_another_number_of_layers_for_a_selection(method, tmp_path):
    four, two = llama(4, attention_bias=True), llama(2, attention_bias=True)
    for model, folder in ((four, "four"), (two, "two")):
        attached(model, getattr(weft, method)())
        weft.save(model, tmp_path / folder)
    if method == "Head":
        refused(llama(2, attention_bias=True), tmp_path / "four", "the base has other weights")
        other = weft.load(llama(2, attention_bias=True), tmp_path / "four", other_base=True)
        assert other.selected
        return
    refused(
        llama(2, attention_bias=True),
        tmp_path / "four",
        "extra: 'model.layers.2",
        "nearest in the model",
    )
    refused(llama(4, attention_bias=True), tmp_path / "two", "missing", "'model.layers.2")


def test_another_number_of_layers_from_peft(tmp_path):
    import peft

    for layers in (2, 4):
        made = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj"])
        peft_saves(peft_of(llama(layers), made), tmp_path / str(layers))
    refused(
        llama(2),
        tmp_path / "4",
        "'base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight'",
        "no module 'model.layers.2.self_attn.q_proj'",
        "nearest in the model: ['model.layers.1.self_attn.q_proj'",
    )
    refused(llama(4), tmp_path / "2", "nothing for 'model.layers.2.self_attn.q_proj'")


@pytest.mark.parametrize("method", [*LLAMA, *SELECTIONS])
def test_another_architecture_with_the_same_names_and_shapes(method, tmp_path):
    model = llama(attention_bias=True)
    attached(model, getattr(weft, method)(**LLAMA.get(method, {})))
    weft.save(model, tmp_path)
    mistral = llama(name="Mistral")
    refused(mistral, tmp_path, "LlamaForCausalLM (llama)", "MistralForCausalLM (mistral)")


def test_another_architecture_from_peft(tmp_path):
    import peft

    made = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj"])
    peft_saves(peft_of(llama(), made), tmp_path / "a")
    assert config_of(tmp_path / "a")["auto_mapping"]
    refused(
        llama(name="Mistral"),
        tmp_path / "a",
        "LlamaForCausalLM (transformers.models.llama.modeling_llama)",
        "MistralForCausalLM (mistral)",
    )
    weft.load(llama(), tmp_path / "a")


@pytest.mark.parametrize("method", ["LoRA", "DoRA"])
def test_another_architecture_is_known_without_our_header(method, tmp_path):
    """What peft can read says its base in peft's way too, so a file that some tool wrote anew is
    still held to it.
    """
    attached(model := llama(attention_bias=True), getattr(weft, method)(r=3))
    weft.save(model, tmp_path)
    rewrite(tmp_path, lambda tensors: None, metadata=False)
    refused(llama(name="Mistral"), tmp_path, "LlamaForCausalLM", "MistralForCausalLM (mistral)")
    weft.load(llama(attention_bias=True), tmp_path)


@pytest.mark.parametrize("writer", ["weft", "peft"])
def test_another_head_on_the_same_architecture_is_the_same_base(writer, tmp_path):
    import peft

    model = llama()
    if writer == "peft":
        made = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj"])
        peft_saves(peft_of(model, made), tmp_path)
    else:
        attached(model, weft.LoRA(r=3, alpha=5))
        weft.save(model, tmp_path)
    other = tiny("LlamaForSequenceClassification", "LlamaConfig", num_labels=3)
    assert len(weft.load(other, tmp_path).sites) == (4 if writer == "peft" else 14)
