"""`model.new_tokens`: tokens by text, added to the tokenizer, whose rows `weft train` trains."""

import json

import pytest
import tiny
import torch
import transformers
from safetensors.torch import save_file

import weft
from weft.checkpoint.files import read_tensors
from weft.cli import main

TOKENS = ["<call>", "</call>"]
GIVEN = json.dumps(TOKENS)


def model(folder, tied=False, cls=transformers.LlamaForCausalLM):
    torch.manual_seed(0)
    fields = {**tiny.WIDTH, "tie_word_embeddings": tied}
    cls(cls.config_class(**fields)).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def place(tmp_path):
    rows = [{"prompt": f"{i}+{i}=", "completion": f"<call>{2 * i}</call>"} for i in range(12)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def run(place, source, *more, method="{name: LoRA, r: 2}", tokens=GIVEN, steps=4):
    (place / "c.yaml").write_text(
        f"out: {place}/run\nmodel: {{path: {source}, new_tokens: {tokens}}}\nmethod: {method}\n"
        f"data: {{train: {place}/p.jsonl}}\noptim: {{lr: 1e-2}}\nsave: {{every: 2}}\n"
        f"train: {{steps: {steps}, batch: 4}}\n"
    )
    return main(["train", str(place / "c.yaml"), *more])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "method", ["{name: LoRA, r: 2}", "{name: VeRA, r: 8}", "{name: Prefix, n: 2}"]
)
def test_tokens_are_added_trained_and_saved_with_the_adapter(place, capsys, tied, method):
    source = model(place / "lm", tied)
    assert run(place, source, method=method) == 0
    said = capsys.readouterr().err
    assert (
        "2 new tokens, ids 260 to 261: their rows train; the model is resized from 260 to" in said
    )
    record = json.loads((place / "run/run.json").read_text())
    rows = [n for n in record["identity"]["trained"] if n.endswith(".rows")]
    assert rows == ["model.embed_tokens.rows", *([] if tied else ["lm_head.rows"])]
    words = transformers.AutoTokenizer.from_pretrained(place / "run/adapter")
    assert words.convert_tokens_to_ids(TOKENS) == [260, 261]
    base = transformers.AutoModelForCausalLM.from_pretrained(source)
    with pytest.raises(
        weft.CheckpointError, match=r"has 260 rows, and none for the id 261. Resize"
    ):
        weft.load(base, place / "run")
    base.resize_token_embeddings(len(words))
    adapter = weft.load(base, place / "run")
    assert adapter.config.new_tokens == (260, 261)
    assert "model.resize_token_embeddings(262)" in (place / "run/README.md").read_text()


@pytest.mark.parametrize("tied", [False, True])
def test_a_merged_model_has_the_new_embeddings(place, tied):
    source = model(place / "lm", tied)
    run(place, source)
    adapter = ["--model", str(source), "--adapter", str(place / "run")]
    assert main(["merge", *adapter, "--out", str(place / "merged")]) == 0
    merged = transformers.AutoModelForCausalLM.from_pretrained(place / "merged")
    tensors = read_tensors(place / "run/adapter/adapter_model.safetensors")[0]
    stored = next(t for key, t in tensors.items() if "embed_tokens.token_adapter" in key)
    assert torch.equal(merged.get_input_embeddings().weight[260:], stored)
    assert merged.config.vocab_size == 262
    assert main(["generate", *adapter, "--prompt", "1+1=", "--max-new-tokens", "2"]) == 0


def test_tokens_of_the_tokenizer_that_the_model_has_no_embeddings_for(place, capsys):
    source = model(place / "lm")
    words = tiny.tokenizer()
    words.add_tokens(TOKENS)
    words.save_pretrained(source)
    assert run(place, source, tokens="tokenizer") == 0
    assert "2 new tokens, ids 260 to 261" in capsys.readouterr().err


def test_tokens_that_have_an_embedding_train_without_a_resize(place, capsys):
    """A vocabulary that is larger than the tokenizer, and a token that is there already."""
    source = model(place / "lm")
    config = transformers.LlamaConfig(**{**tiny.WIDTH, "vocab_size": 300})
    transformers.LlamaForCausalLM(config).save_pretrained(source)
    assert run(place, source, tokens='["<call>", "</call>", "<|im_end|>"]') == 0
    said = capsys.readouterr().err
    assert "their rows train.\n" in said and "already, so their present rows train: ['<|im" in said
    record = json.loads((place / "run/run.json").read_text())
    assert record["identity"]["trained"]["model.embed_tokens.rows"] == "[3, 16] float32"


def test_a_stopped_run_resumes_to_the_same_rows(place, monkeypatch):
    from weft.training import loop

    source = model(place / "lm")
    run(place, source)
    whole = read_tensors(place / "run/adapter/adapter_model.safetensors")[0]
    (place / "run").rename(place / "whole")

    class Killed(Exception):
        pass

    class Kill(loop.Epochs):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step == 3:
                raise Killed

    monkeypatch.setattr(loop, "Epochs", Kill)
    with pytest.raises(Killed):
        run(place, source)
    monkeypatch.undo()
    assert run(place, source, "--resume") == 0
    again = read_tensors(place / "run/adapter/adapter_model.safetensors")[0]
    assert whole.keys() == again.keys()
    assert all(torch.equal(t, again[key]) for key, t in whole.items())


@pytest.mark.parametrize(
    ("tokens", "method", "words"),
    [
        ("[]", "{name: LoRA}", "write a list of different tokens"),
        ('["<a>", "<a>"]', "{name: LoRA}", "write a list of different tokens"),
        ('[""]', "{name: LoRA}", "write a list of different tokens"),
        ("all", "{name: LoRA}", "write a list of different tokens"),
        ("[7]", "{name: LoRA}", "write a list of different tokens"),
        ("tokenizer", "{name: LoRA}", "so there is none to train"),
        ('["<a>"]', "{name: LoRA, new_tokens: [3]}", "which is given too"),
    ],
)
def test_values_without_a_meaning(place, capsys, tokens, method, words):
    assert run(place, model(place / "lm"), tokens=tokens, method=method) == 2
    assert words in capsys.readouterr().err and not (place / "run").exists()


def test_a_start_must_have_the_same_tokens(place, capsys):
    source = model(place / "lm")
    run(place, source)
    (place / "run").rename(place / "first")
    start = ["--set", f"adapter.start={place}/first"]
    assert run(place, source, *start) == 0
    (place / "run").rename(place / "second")
    capsys.readouterr()
    assert run(place, source, *start, tokens='["<call>", "<other>"]') == 2
    assert "token 261 is '</call>' there and '<other>' in this run" in capsys.readouterr().err
    assert run(place, source, *start, tokens='["<call>"]') == 2


@pytest.mark.parametrize("ids", [[10**6], [2**31 - 1]])
def test_a_file_cannot_make_the_base_grow_beyond_its_own_rows(place, capsys, ids):
    """Of another, larger model, or made to fill the memory."""
    source = model(place / "lm", tied=True)
    base = transformers.AutoModelForCausalLM.from_pretrained(source)
    weft.attach(base, weft.LoRA(r=2, new_tokens=[7]))
    weft.save(base, place / "adapter")
    config = json.loads((place / "adapter/adapter_config.json").read_text())
    config["trainable_token_indices"] = {"model.embed_tokens": ids}
    (place / "adapter/adapter_config.json").write_text(json.dumps(config))
    tensors = read_tensors(place / "adapter/adapter_model.safetensors")[0]
    save_file(tensors, place / "adapter/adapter_model.safetensors")  # as a file of peft
    adapter = ["--model", str(source), "--adapter", str(place / "adapter")]
    assert main(["generate", *adapter, "--prompt", "a"]) == 1
    assert "has 1 of them, and this model has 260" in capsys.readouterr().err
