"""Rows of new tokens to and from peft's `trainable_token_indices`."""

import json

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import weft
from support import distance

pytestmark = pytest.mark.filterwarnings("ignore")  # peft's own

WORDS, IDS = 40, torch.tensor([[1, 37, 5, 39, 2], [39, 37, 3, 4, 5]])
NEW = [39, 37]  # in peft the order of the rows


def llama(tied):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=WORDS,
        hidden_size=16,
        intermediate_size=28,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config).eval()


def run(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def peft_file(folder, tied, indices, kind="LORA", **fields):
    """Saves an adapter of peft whose tensors are off their start, and returns its outputs."""
    cls = {"LORA": peft.LoraConfig, "ADALORA": peft.AdaLoraConfig}[kind]
    given = cls(target_modules=["q_proj"], trainable_token_indices=indices, **fields)
    model = peft.get_peft_model(llama(tied), given)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
    model.save_pretrained(folder)
    return run(model.eval())


INDICES = {
    "list": NEW,
    "dict": {"embed_tokens": NEW},
    "both": {"embed_tokens": NEW, "lm_head": NEW},
    "full names": {"model.embed_tokens": NEW},
}
KINDS = [
    ("LORA", {"r": 2}),
    ("LORA", {"r": 2, "use_dora": True}),
    ("ADALORA", {"init_r": 3, "target_r": 2, "total_step": 9}),
]


@pytest.mark.parametrize(("kind", "fields"), KINDS, ids=["lora", "dora", "adalora"])
@pytest.mark.parametrize("indices", INDICES)
@pytest.mark.parametrize("tied", [True, False])
def test_from_peft_and_back(tied, indices, kind, fields, tmp_path):
    wanted = peft_file(tmp_path / "peft", tied, INDICES[indices], kind, **fields)
    model = llama(tied)
    base = run(model)
    adapter = weft.load(model, tmp_path / "peft")
    assert distance(run(model), wanted) < 1e-5 < distance(wanted, base)
    heads = 1 if tied or indices != "both" else 2
    assert len(adapter.token_rows) == heads
    adapter.save(tmp_path / "weft")
    again = llama(tied)
    weft.load(again, tmp_path / "weft")
    assert distance(run(again), wanted) < 1e-5
    found = peft.PeftModel.from_pretrained(llama(tied), tmp_path / "weft")
    assert distance(run(found.eval()), wanted) < 1e-5


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("form", ["LoRA", "DoRA", "exported"])
def test_new_tokens_of_weft_load_in_peft(tied, form, tmp_path):
    model = llama(tied)
    method = (
        weft.DyLoRA(r=2, new_tokens=NEW)
        if form == "exported"
        else getattr(weft, form)(r=2, new_tokens=NEW)
    )
    adapter = weft.attach(model, method)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.3 * torch.randn_like(p))
    weft.save(model, tmp_path / "own")
    if form == "exported":
        assert not weft.inspect(tmp_path / "own").readable_by_peft
        report = weft.export(tmp_path / "own", "lora", tmp_path / "peft")
        assert report.error < 1e-5 and "new tokens" in str(report)
    folder = tmp_path / ("peft" if form == "exported" else "own")
    found = peft.PeftModel.from_pretrained(llama(tied), folder)
    assert distance(run(found.eval()), run(model)) < 1e-5


def changed(folder, config=None, tensors=None):
    """Edits the files of an adapter of peft."""
    file = folder / "adapter_config.json"
    data = json.loads(file.read_text())
    file.write_text(json.dumps({**data, **(config or {})}))
    stored = load_file(folder / "adapter_model.safetensors")
    if tensors is not None:
        save_file(tensors(stored), folder / "adapter_model.safetensors")


KEY = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"


@pytest.mark.parametrize(
    ("config", "tensors", "words"),
    [
        ({"trainable_token_indices": [37]}, None, r"shape \[2, 16\] in the file, 1 rows expected"),
        (
            {"trainable_token_indices": None},
            None,
            f"extra: '{KEY.removeprefix('base_model.model.')}",
        ),
        (
            {},
            lambda t: {k: v for k, v in t.items() if k != KEY},
            "missing: trainable_token_indices",
        ),
        ({}, lambda t: {**t, KEY: t[KEY][:, :9].clone()}, r"\[2, 9\] in the file, \[2, 16\]"),
        ({}, lambda t: {**t, KEY: t[KEY] * float("nan")}, "holds NaN"),
        ({"trainable_token_indices": [37, 37]}, None, "37 is given twice"),
        ({"trainable_token_indices": "all"}, None, "a list of ids, or ids by module"),
        ({"trainable_token_indices": [37, 99]}, None, "40 rows, and none for the id 99"),
    ],
)
def test_files_that_do_not_fit(config, tensors, words, tmp_path):
    peft_file(tmp_path, True, NEW, r=2)
    changed(tmp_path, config, tensors)
    model = llama(True)
    with pytest.raises(weft.CheckpointError, match=words):
        weft.load(model, tmp_path)
    assert not weft.adapters(model)


def test_a_dictionary_that_names_a_head_without_rows_of_its_own(tmp_path):
    """peft writes one tensor of a tied pair; in a model with a head of its own the other is missing."""
    peft_file(tmp_path, True, INDICES["both"], r=2)
    weft.load(llama(True), tmp_path)
    with pytest.raises(weft.CheckpointError, match="no rows for the new tokens of 'lm_head'"):
        weft.load(llama(False), tmp_path)


@pytest.mark.parametrize("indices", ["list", "both"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_vocabulary_that_was_resized_for_peft(tied, indices, tmp_path):
    """peft then writes the whole tables too, with random new rows of an untied head."""
    base = tmp_path / "base"
    llama(tied).save_pretrained(base)

    def resized(extra=2):
        made = transformers.AutoModelForCausalLM.from_pretrained(base)
        made.resize_token_embeddings(WORDS + extra)
        return made.eval()

    new = [WORDS + 1, WORDS]
    given = new if indices == "list" else {"embed_tokens": new, "lm_head": new}
    made = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=given)
    theirs = peft.get_peft_model(resized(), made)
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.3 * torch.randn_like(p) if p.requires_grad else 0)
    theirs.save_pretrained(tmp_path / "peft")
    assert any(
        "base_layer" in key for key in load_file(tmp_path / "peft/adapter_model.safetensors")
    )
    ids = torch.tensor([[1, WORDS, 2, WORDS + 1]])
    with torch.no_grad():
        wanted = theirs.eval()(input_ids=ids).logits
        model = resized()
        weft.load(model, tmp_path / "peft")
        assert distance(model(ids).logits, wanted) < 1e-5
    weft.save(model, tmp_path / "weft")
    again = resized()
    weft.load(again, tmp_path / "weft")
    assert distance(again(ids).logits, wanted) < 1e-5
    other = resized()
    with torch.no_grad():
        other.get_input_embeddings().weight[3] += 1
    with pytest.raises(weft.CheckpointError, match="repeats this tensor of its base"):
        weft.load(other, tmp_path / "peft")
    with pytest.raises(weft.CheckpointError, match="has 40 rows, and none for the id 41"):
        weft.load(llama(tied), tmp_path / "peft")
