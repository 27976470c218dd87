"""Names that wrappers and nesting change are found, said in `load_report.mapped`, and never
guessed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_support import (
    attached,
    close,
    ids,
    llama,
    logits,
    peft_of,
    peft_reads,
    peft_saves,
    quiet,
    read,
    refused,
    rewrite,
    untouched,
)
from torch import Tensor, nn

import weft
from support import awake, config, inputs, net, same_bits
from weft.checkpoint.matching import match
from weft.model.structure import canonical


class Wrapper(nn.Module):
    """What FSDP and activation checkpointing do to names."""

    def __init__(self, inner: nn.Module, part: str) -> None:
        super().__init__()
        self.part = part
        self.add_module(part, inner)

    def forward(self, x: Tensor) -> Tensor:
        return self._modules[self.part](x)


def wrapped(model: nn.Module, how: str) -> nn.Module:
    """The model, or its layer `mid`, in one of the wrappers."""
    if how == "parallel":
        return nn.DataParallel(model)
    if how == "_fsdp_wrapped_module":
        return Wrapper(model, how)
    if how == "compiled":
        return torch.compile(model, backend="eager")
    if how == "compiled layer":
        model.mid = torch.compile(model.mid, backend="eager")
    else:
        model.mid = Wrapper(model.mid, how.removesuffix(" layer"))
    return model


@pytest.fixture(autouse=True)
def _nothing_is_compiled():
    """Names are what is tested here; compiling each little layer would take most of the time."""
    with torch.compiler.set_stance("force_eager"):
        yield


WRAPPED = [
    "parallel",
    "compiled",
    "_fsdp_wrapped_module",
    "compiled layer",
    "_fsdp_wrapped_module layer",
    "_checkpoint_wrapped_module layer",
]
METHODS = ["LoRA", "DoRA", "VeRA", "DVoRA", "Full"]


@pytest.mark.parametrize("how", WRAPPED)
@pytest.mark.parametrize("method", METHODS)
def test_a_plain_file_in_a_wrapped_model(method, how, tmp_path):
    a = awake(method)
    weft.save(a.model, tmp_path)
    model = wrapped(net(), how)
    loaded = weft.load(model, tmp_path)
    inside = how.endswith("layer") or how.startswith("_")
    assert bool(loaded.load_report.mapped) == inside
    part = how.replace("compiled", "_orig_mod").removesuffix(" layer")
    assert all(part in line for line in loaded.load_report.mapped)
    assert same_bits(model(a.x), a.run())


@pytest.mark.parametrize("how", WRAPPED)
@pytest.mark.parametrize("method", METHODS)
def test_a_file_from_a_wrapped_model_has_plain_names(method, how, tmp_path):
    model = wrapped(net(), how)
    made = config(method, targets=[r"(.*\.)?layer", r"(.*\.)?mid(\..*)?"])
    adapter = attached(model, made)
    adapter.save(tmp_path)
    assert all(
        part not in key
        for key in read(tmp_path)[0]
        for part in ("_orig_mod", "_fsdp", "_checkpoint", "module.")
    )
    plain = net()
    loaded = weft.load(plain, tmp_path)
    assert loaded.load_report.mapped == []
    assert same_bits(plain(inputs("linear")), model(inputs("linear")))
    other = wrapped(net(), how)
    assert same_bits(weft.load(other, tmp_path).model(inputs("linear")), plain(inputs("linear")))


@pytest.mark.parametrize("writer", ["wrapped", "plain"])
def test_fsdp2_makes_a_subclass_of_the_model(writer, tmp_path):
    """fully_shard(model) changes the model's class to FSDPNet, which is no other base."""
    model, other = net(), net()
    sharded = model if writer == "wrapped" else other
    sharded.__class__ = type("FSDPNet", (type(sharded),), {})
    attached(model, config("LoRA"))
    weft.save(model, tmp_path)
    assert weft.inspect(tmp_path).base["class"] == "Net"
    weft.load(other, tmp_path)


def test_peft_reads_a_file_from_a_model_with_compiled_layers(tmp_path):
    model = wrapped(net(), "compiled layer")
    attached(model, weft.LoRA(r=3, alpha=5, targets={"layer": {"r": 2}, r"mid\._orig_mod": {}}))
    weft.save(model, tmp_path)
    x = inputs("linear")
    close(logits(peft_reads(net(), tmp_path), x), logits(model, x), logits(net(), x))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("method", ["LoRA", "VeRA"])
def test_a_file_that_a_wrapped_peft_model_has_written(method, prefix, tmp_path):
    import peft

    with quiet():
        kind = (
            peft.LoraConfig(r=3, lora_alpha=5, target_modules=["layer", "mid"])
            if method == "LoRA"
            else peft.VeraConfig(r=3, target_modules=["layer", "mid"])
        )
    model = peft_of(net(), kind)
    peft_saves(model, tmp_path)
    rewrite(tmp_path, lambda t: [t.update({prefix + k: t.pop(k)}) for k in list(t)])
    mine = net()
    report = weft.load(mine, tmp_path).load_report
    assert report.mapped == [f"{prefix}base_model.model.* in the file is * in the model"]
    x = inputs("linear")
    close(logits(mine, x), logits(model, x), logits(net(), x))


@pytest.mark.parametrize(
    "prefix", ["", "base_model.model.module.", "base_model.model.base_model.model."]
)
def test_a_file_of_peft_with_other_prefixes(prefix, tmp_path):
    import peft

    model = peft_of(net(), peft.LoraConfig(r=3, lora_alpha=5, target_modules=["layer", "mid"]))
    peft_saves(model, tmp_path)
    rewrite(
        tmp_path,
        lambda t: [t.update({k.replace("base_model.model.", prefix): t.pop(k)}) for k in list(t)],
    )
    mine = net()
    assert len(weft.load(mine, tmp_path).load_report.mapped) == 1
    x = inputs("linear")
    close(logits(mine, x), logits(model, x), logits(net(), x))


def test_one_tensor_under_two_prefixes_is_refused(tmp_path):
    import peft

    model = peft_of(net(), peft.LoraConfig(r=3, lora_alpha=5, target_modules=["layer", "mid"]))
    peft_saves(model, tmp_path)
    key = "base_model.model.mid.lora_A.weight"
    rewrite(tmp_path, lambda t: t.update({"module." + key: t[key] + 1}))
    refused(net(), tmp_path, "under another prefix too", key)


def llava(text: str = "Llama") -> Any:
    """A vision model around a Llama: model.language_model.layers...; the Llama's own names are
    model.layers...
    """
    import transformers

    inner = llama(name=text).config
    vision = transformers.CLIPVisionConfig(
        hidden_size=18,
        intermediate_size=20,
        num_hidden_layers=1,
        num_attention_heads=3,
        image_size=8,
        patch_size=4,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        outer = transformers.LlavaForConditionalGeneration(
            transformers.LlavaConfig(text_config=inner, vision_config=vision, image_token_index=60)
        ).eval()
    alone = llama(name=text)
    outer.model.language_model.load_state_dict(alone.model.state_dict())
    outer.lm_head.load_state_dict(alone.lm_head.state_dict())
    return outer


def saved_llama(folder: Path, writer: str) -> Tensor:
    """An adapter of a Llama on its own, and its logits."""
    import peft

    model = llama()
    if writer == "peft":
        model = peft_of(
            model, peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj"])
        )
        peft_saves(model, folder)
    else:
        attached(model, getattr(weft, writer)(r=3, targets=["q_proj", "v_proj"]))
        weft.save(model, folder)
    return logits(model)


@pytest.mark.parametrize("writer", ["peft", "LoRA", "DVoRA"])
def test_an_adapter_of_a_language_model_in_a_vision_language_model(writer, tmp_path):
    wanted = saved_llama(tmp_path, writer)
    outer = llava()
    loaded = weft.load(outer, tmp_path)
    assert loaded.load_report.mapped == [
        "model.* in the file is model.language_model.* in the model"
    ]
    assert all("language_model" in name for name in loaded.sites)
    close(logits(outer), wanted, logits(llama()), 1e-6)


@pytest.mark.parametrize("writer", ["peft", "LoRA", "DVoRA"])
def test_an_adapter_of_a_vision_language_model_in_its_language_model(writer, tmp_path):
    import peft

    outer = llava()
    targets = r".*language_model.*\.(q_proj|v_proj)"
    if writer == "peft":
        outer = peft_of(outer, peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets))
        peft_saves(outer, tmp_path)
    else:
        attached(outer, getattr(weft, writer)(r=3, targets=targets))
        weft.save(outer, tmp_path)
    model = llama()
    loaded = weft.load(model, tmp_path)
    assert loaded.load_report.mapped == [
        "model.language_model.* in the file is model.* in the model"
    ]
    assert bool(loaded.load_report.notes) == (
        writer == "peft"
    )  # which does not say what it was nested in
    close(logits(model), logits(outer), logits(llama()), 1e-6)


def test_an_adapter_of_the_nested_model_itself(tmp_path):
    """Saved from `outer.model.language_model` as a model of its own: its names begin with
    layers.
    """
    outer = llava()
    adapter = attached(
        outer.model.language_model, weft.LoRA(r=3, alpha=5, targets=["q_proj", "v_proj"])
    )
    weft.save(outer.model.language_model, tmp_path)
    assert all(name.startswith("layers.") for name in adapter.sites)
    wanted = logits(outer)
    other = llava()
    assert weft.load(other, tmp_path).load_report.mapped == [
        "* in the file is model.language_model.* in the model"
    ]
    close(logits(other), wanted, logits(llava()), 1e-6)


def test_a_nested_model_of_another_architecture_is_refused(tmp_path):
    saved_llama(tmp_path / "a", "LoRA")
    refused(llava("Mistral"), tmp_path / "a", "LlamaForCausalLM (llama)", "MistralModel (mistral)")
    saved_llama(tmp_path / "p", "peft")
    refused(
        llava("Mistral"),
        tmp_path / "p",
        "LlamaForCausalLM (transformers.models.llama",
        "MistralModel (mistral)",
    )
    outer = llava()
    attached(outer, weft.LoRA(r=3, targets=r".*language_model.*q_proj"))
    weft.save(outer, tmp_path / "b")
    refused(llava("Mistral"), tmp_path / "b", "LlavaForConditionalGeneration (llava)")
    refused(llama(name="Mistral"), tmp_path / "b", "MistralForCausalLM (mistral)")
    weft.load(llava(), tmp_path / "b")


def test_a_nested_model_with_more_layers_is_refused(tmp_path):
    """The vision tower's q_proj is no missing layer; the language model's third one is."""
    model = llama(2)
    attached(model, weft.LoRA(r=3, targets=["q_proj"]))
    weft.save(model, tmp_path)
    outer = llava()
    outer.model.language_model = llama(3).model
    message = refused(
        outer, tmp_path, "nothing for 'model.language_model.layers.2.self_attn.q_proj'"
    )
    assert "vision" not in message


def test_a_head_in_a_nested_model(tmp_path):
    model = llama()
    attached(model, weft.LoRA(r=3, targets=["q_proj"], modules_to_save=["lm_head"]))
    weft.save(model, tmp_path)
    outer = llava()
    assert list(weft.load(outer, tmp_path).selected) == ["lm_head.weight"]
    close(logits(outer), logits(model), logits(llama()), 1e-6)


def test_names_are_never_guessed():
    """One that could be two modules is missing; the right names win over a mapping."""
    have = [
        "",
        "a.language_model.x",
        "a.x",
        "language_model.y",
        "module.z",
        "_orig_mod.z",
        "b.language_model.w",
        "c.language_model.w",
    ]
    assert match(["a.x"], have).found == {"a.x": "a.x"}
    assert match(["module.a.x"], have).found == {"module.a.x": "a.x"}
    assert match(["y"], have).found == {"y": "language_model.y"}
    assert match(["z"], have).missing == ["z"]
    assert match(["w"], have).missing == ["w"]
    assert match(["my_module.x"], ["x"]).missing == ["my_module.x"]
    assert match([], have).found == {}
    assert canonical("a._orig_mod.b._fsdp_wrapped_module") == "a.b"


def test_a_failed_mapping_leaves_the_model_alone(tmp_path):
    saved_llama(tmp_path, "LoRA")
    outer = nn.ModuleDict({"one": llama(), "two": llama()})
    with untouched(outer), pytest.raises(weft.CheckpointError, match=r"no module 'model\.layers"):
        weft.load(outer, tmp_path)
    assert ids().shape == (2, 7)
