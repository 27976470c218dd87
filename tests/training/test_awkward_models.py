"""Models that fit their tokenizer badly: no pad token, short tables, missing embeddings, own code."""

import ast
import json
from pathlib import Path

import pytest
import tiny
import torch
import transformers

import weft
from weft.cli import main
from weft.tasks.vocabulary import check_ids, learned_positions, max_positions, padding

GPT2 = {"vocab_size": 260, "n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": 1}


def gpt2(folder, positions=64, pad="<pad>"):
    torch.manual_seed(0)
    config = transformers.GPT2Config(**GPT2, eos_token_id=2, n_positions=positions)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    words = tiny.tokenizer()
    words.pad_token, words.model_max_length = pad, 10**30
    words.save_pretrained(folder)
    return folder


def run(tmp_path, model, data, method="{name: LoRA, r: 2}", out="run", **sections):
    rest = "".join(f"{name}: {text}\n" for name, text in sections.items())
    file = tmp_path / "c.yaml"
    file.write_text(
        f"out: {tmp_path}/{out}\nmodel: {{path: {model}}}\nmethod: {method}\n"
        f"data: {{train: {data}}}\ntrain: {{steps: 3, batch: 4}}\n{rest}"
    )
    return main(["train", str(file)])


def test_a_classifier_without_pad_token_trains_evaluates_and_merges(tmp_path, capsys):
    model = gpt2(tmp_path / "gpt2", pad=None)
    data = tiny.labelled(tmp_path / "l.csv")
    assert run(tmp_path, model, data) == 0
    adapter = ["--model", str(model), "--adapter", str(tmp_path / "run")]
    assert main(["eval", *adapter, "--task", f"csv:{data}"]) == 0
    assert main(["merge", *adapter, "--out", str(tmp_path / "merged")]) == 0
    assert json.loads((tmp_path / "merged/config.json").read_text())["pad_token_id"] == 2
    assert main(["eval", "--model", str(tmp_path / "merged"), "--task", f"csv:{data}"]) == 0
    out = capsys.readouterr().out
    scores = [line for line in out.splitlines() if "accuracy" in line]
    assert len(scores) == 2 and scores[0] == scores[1]


def test_padding_does_not_change_what_a_classifier_without_pad_token_says(tmp_path):
    """A row alone and beside a longer one, through the configuration that training writes."""
    from weft.inference.evaluate import evaluate
    from weft.inference.opened import open_model

    model = gpt2(tmp_path / "gpt2", pad=None)
    data = tiny.labelled(tmp_path / "l.csv", n=40)
    run(tmp_path, model, data)
    opened = open_model(str(model), str(tmp_path / "run"))
    seen = []
    opened.model.register_forward_hook(
        lambda m, a, k, out: seen.append(out.logits), with_kwargs=True
    )
    evaluate(opened, f"csv:{data}", batch=1)
    single, seen[:] = torch.cat(seen), []
    evaluate(opened, f"csv:{data}", batch=3)
    assert torch.allclose(torch.cat(seen), single, atol=1e-5) and len(single) > 3


@pytest.mark.parametrize(
    ("model", "wanted"),
    [
        (transformers.RobertaModel, 32),  # positions begin at padding_idx + 1
        (transformers.BertModel, 34),
        (transformers.GPT2Model, 34),
        (transformers.OPTModel, 34),  # the table has two more rows than the configuration says
        (transformers.LlamaModel, None),  # computed
    ],
)
def test_the_positions_of_a_table(model, wanted):
    config = model.config_class(
        vocab_size=60,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=34,
        pad_token_id=1,
    )
    made = model(config).eval()
    assert learned_positions(made) == wanted
    limit = max_positions(config, made)
    assert limit == (wanted or 34)
    ids = torch.full((1, limit), 5)
    made(ids)
    if wanted is not None:
        with pytest.raises((IndexError, RuntimeError)):
            made(torch.full((1, limit + 1), 5))


@pytest.mark.parametrize("method", ["{name: Prefix, n: 5}", "{name: PreEmbed, l_p: 3, l_i: 2}"])
def test_samples_leave_room_for_virtual_tokens(tmp_path, capsys, method):
    model, data = gpt2(tmp_path / "gpt2", positions=40), tmp_path / "t.jsonl"
    data.write_text("".join(json.dumps({"text": "a" * n}) + "\n" for n in (30, 50, 33, 60)))
    assert run(tmp_path, model, data, method) == 0
    assert "samples are cut at 35." in capsys.readouterr().err


def test_virtual_tokens_that_leave_no_room_are_refused(tmp_path, capsys):
    model, data = gpt2(tmp_path / "gpt2", positions=40), tmp_path / "t.jsonl"
    data.write_text('{"text": "a"}\n')
    assert run(tmp_path, model, data, "{name: Prefix, n: 40}") == 2
    assert "leave none of the model's 40 positions" in capsys.readouterr().err


def test_a_roberta_whose_tokenizer_has_no_limit_trains(tmp_path, capsys):
    torch.manual_seed(0)
    config = transformers.RobertaConfig(
        **{**tiny.WIDTH, "max_position_embeddings": 34, "pad_token_id": 1}
    )
    transformers.RobertaModel(config).save_pretrained(tmp_path / "model")
    words = tiny.tokenizer(None)
    words.model_max_length, words.pad_token = 10**30, "<s>"
    words.save_pretrained(tmp_path / "model")
    data = tmp_path / "l.csv"
    data.write_text("text,label\n" + "".join(f"{'good' * (i + 5)},{i % 2}\n" for i in range(8)))
    assert run(tmp_path, tmp_path / "model", data) == 0
    assert "samples are cut at 32." in capsys.readouterr().err


def test_a_tokenizer_larger_than_the_embedding_is_refused_by_token(tmp_path, capsys):
    model = tiny.language_model(tmp_path / "lm")
    words = tiny.tokenizer()
    words.add_tokens(["<one>", "<two>"])
    words.save_pretrained(model)
    data = tmp_path / "t.jsonl"
    data.write_text('{"text": "fine"}\n{"text": "not <two> fine"}\n')
    assert run(tmp_path, model, data) == 1
    error = capsys.readouterr().err
    assert "training, sample 2: token '<two>' has the id 261, and the model has 260" in error
    assert main(["generate", "--model", str(model), "--prompt", "a <two>"]) == 1
    assert "prompt 1: token '<two>' has the id 261" in capsys.readouterr().err


def test_a_pad_token_without_embedding_is_not_used(tmp_path, capsys):
    model = tiny.language_model(tmp_path / "lm")
    words = tiny.tokenizer()
    words.add_tokens(["<one>"])
    words.add_special_tokens({"pad_token": "[PAD]"})
    words.save_pretrained(model)
    assert run(tmp_path, model, tiny.pairs(tmp_path / "p.jsonl")) == 0
    assert "pad token is 261, and the model has 260 embeddings; rows are padded with token 2" in (
        capsys.readouterr().err
    )
    prompts = ["--prompt", "a", "--prompt", "a longer one"]
    assert main(["generate", "--model", str(model), *prompts, "--max-new-tokens", "2"]) == 0


def test_padding_and_ids_without_a_vocabulary_in_the_configuration():
    words, config = tiny.tokenizer(), transformers.ViTConfig()
    assert padding(words, config) == (0, None)
    check_ids([[10**6]], words, config, "sample")


@pytest.mark.parametrize("argv", [["plan", "--method", "lora"], ["generate", "--prompt", "a"]])
def test_code_that_comes_with_a_model_is_neither_run_nor_asked_for(
    tmp_path, capsys, monkeypatch, argv
):
    model = tiny.language_model(tmp_path / "lm")
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "code.C"}}
    (model / "config.json").write_text(json.dumps(config))
    (model / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")

    def asked(*_):
        raise AssertionError("a question on the terminal")

    monkeypatch.setattr("builtins.input", asked)
    assert main([argv[0], "--model", str(model), *argv[1:]]) == 1
    captured = capsys.readouterr()
    assert "Python code that comes with it" in captured.err and "[y/N]" not in captured.out
    assert not (tmp_path / "ran").exists()


def test_every_load_passes_the_options_of_its_model():
    """A from_pretrained of the library without `**ref.options` could ask or run code."""
    free = {"GenerationConfig"}  # has no code
    loose = []
    for path in Path(weft.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            call = node.func if isinstance(node, ast.Call) else None
            if not isinstance(call, ast.Attribute) or call.attr != "from_pretrained":
                continue
            spread = [k.value for k in node.keywords if k.arg is None]
            local = any(k.arg == "gguf_file" for k in node.keywords)  # a file that Weft unpacks
            never = any(
                k.arg == "trust_remote_code" and ast.unparse(k.value) == "False"
                for k in node.keywords
            )
            if getattr(call.value, "id", "") in free or local or never:
                continue
            if not any(isinstance(v, ast.Attribute) and v.attr == "options" for v in spread):
                loose.append(f"{path.name}:{node.lineno}")
    assert not loose


def labelled_encoder(tmp_path, spoil):
    """A BERT whose classifier reads the pooler, and which `spoil` changes before it is saved."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        **{k: v for k, v in tiny.WIDTH.items() if not k.startswith(("bos", "eos"))}
    )
    spoil(config)
    transformers.BertModel(config).save_pretrained(tmp_path / "model")
    tiny.tokenizer(None).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_layers_that_no_gradient_reaches_are_named_or_allowed(tmp_path, capsys, monkeypatch):
    model = labelled_encoder(tmp_path, lambda config: None)
    layers = transformers.models.bert.modeling_bert.BertLayer
    forward, calls = layers.forward, []

    def dropped(self, hidden, *args, **kwargs):  # the second of two blocks, as layerdrop would
        calls.append(self)
        return forward(self, hidden, *args, **kwargs) if len(calls) % 2 else hidden

    monkeypatch.setattr(layers, "forward", dropped)
    data = tiny.labelled(tmp_path / "l.csv")
    assert run(tmp_path, model, data) == 1
    assert "Gradients reached bert.encoder.layer.1.attention" in capsys.readouterr().err
    assert run(tmp_path, model, data, out="second", audit="{unreached: allow}") == 0
    assert (
        "audit: in the first 3 steps gradients reached 6 modules never or more rarely"
        in capsys.readouterr().err
    )
    names = json.loads((tmp_path / "second/run.json").read_text())["unreached"]
    assert len(names) == 6 and all(".layer.1." in name for name in names)


def test_batch_norms_need_the_switch(tmp_path, capsys, monkeypatch):
    model = labelled_encoder(tmp_path, lambda config: None)
    output = transformers.models.bert.modeling_bert.BertOutput
    made, called = output.__init__, output.forward

    def built(self, config):
        made(self, config)
        self.batch_norm = torch.nn.BatchNorm1d(config.hidden_size)

    def normed(self, hidden, residual):
        return self.batch_norm(called(self, hidden, residual).mT).mT

    monkeypatch.setattr(output, "__init__", built)
    monkeypatch.setattr(output, "forward", normed)
    labelled_encoder(tmp_path, lambda config: None)
    data = tiny.labelled(tmp_path / "l.csv")
    assert run(tmp_path, model, data) == 2
    assert "2 batch norms of the frozen base, 'bert.encoder.layer.0.output.batch_norm' first" in (
        capsys.readouterr().err
    )
    method = "{name: LoRA, r: 2, freeze_batch_norm: true}"
    assert run(tmp_path, model, data, method) == 0
