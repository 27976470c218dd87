"""`weft plan`, `inspect`, `merge`, `doctor` as a user runs them."""

import argparse
import importlib
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import weft
from support import set_way
from weft.cli import COMMANDS, main
from weft.tasks.models import EMBEDDED

LLAMA_7B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}


def run(capsys, *words):
    status = main(list(words))
    shown = capsys.readouterr()
    long = [
        line for line in shown.out.splitlines() if len(line) > 80 and "pytest-" not in line
    ]  # paths may be long
    assert not long
    return status, shown.out, shown.err


def digits_vit(labels=3):
    import transformers

    return transformers.AutoModelForImageClassification.from_pretrained(
        EMBEDDED["digits-vit"], num_labels=labels, ignore_mismatched_sizes=True
    )


def awake(adapter):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)


@pytest.fixture
def pixels():
    return torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def llama(tmp_path):
    path = tmp_path / "llama-7b.json"
    path.write_text(json.dumps(LLAMA_7B))
    return path


def test_plan_counts_the_paper_rows_of_llama_7b_without_weights(capsys, tmp_path, llama):
    # DoRA paper, table 1: r=32 on q, k, v, up, down of LLaMA-7B trains 0.84 %; DVoRA, table 4
    # (r=1024, all): 0.04 %.
    status, out, _ = run(
        capsys,
        "plan",
        "--model",
        str(llama),
        "--method",
        "dora",
        "--r",
        "32",
        "--targets",
        "q_proj,k_proj,v_proj,up_proj,down_proj",
        "--json",
        str(tmp_path / "plan.json"),
    )
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert status == 0
    assert plan["trainable"] == 56_975_360 and f"{plan['trainable']:,}" in out
    assert plan["memory"]["base"] == 2 * plan["base_parameters"] == 2 * 6_738_415_616
    assert plan["memory"]["optimiser"] == 2 * 4 * plan["trainable"]
    assert {row["reason"] for row in plan["frozen"]} == {
        "embedding",
        "output head",
        "not named by targets",
    }
    run(
        capsys,
        "plan",
        "--model",
        str(llama),
        "--method",
        "dvora",
        "--r",
        "1024",
        "--json",
        str(tmp_path / "plan.json"),
    )
    assert json.loads((tmp_path / "plan.json").read_text())["trainable"] == 2_949_120


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux only")
def test_plan_of_7b_stays_below_one_gigabyte(llama):
    code = (
        "import sys, resource; from weft.cli import main; "
        "main(['plan', '--model', sys.argv[1], '--method', 'vera']); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(llama)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout.split()[-1]) < 2**20
    assert resource.RLIM_INFINITY is not None


def test_plan_counts_the_activations_that_autograd_really_keeps(capsys, tmp_path, monkeypatch):
    import transformers

    set_way(monkeypatch, "fused")  # as all layers of a real model

    config = transformers.LlamaConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=50,
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    status, _, _ = run(
        capsys,
        "plan",
        "--model",
        str(tmp_path),
        "--method",
        "lora",
        "--r",
        "3",
        "--dtype",
        "float32",
        "--batch",
        "2",
        "--tokens",
        "7",
        "--json",
        str(tmp_path / "plan.json"),
    )
    planned = json.loads((tmp_path / "plan.json").read_text())["memory"]["activations"]
    model = transformers.LlamaForCausalLM(config).train()
    weft.attach(model, weft.LoRA(r=3))
    known = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(t):
        if t.untyped_storage()._cdata not in known:
            kept[t.untyped_storage()._cdata] = t.untyped_storage()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(input_ids=torch.zeros(2, 7, dtype=torch.int64))
    real = sum(s.nbytes() for s in kept.values())
    assert status == 0
    # The attention kernel of the CPU keeps a few more vectors than the meta device's decomposition,
    # never fewer matrices.
    assert planned == pytest.approx(real, rel=0.15)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--model", "digits-vit", "--method", "dorra"], "DoRA"),
        (["--model", "digits-vit", "--method", "dora", "--r", "0"], "DoRA(r=0)"),
        (["--model", "digits-vit", "--method", "lora", "--set", "alpa=3"], "alpha"),
        (["--model", "digits-vit", "--method", "lora", "--targets", "q_porj"], "q_proj"),
        (["--model", "digits-vitt", "--method", "lora"], "digits-vit"),
        (["--model", "digits-vit", "--method", "lora", "--batch", "3"], "--tokens"),
        (["--model", "digits-vit", "--method", "bitfit", "--r", "3"], "'r'"),
    ],
)
def test_plan_refuses_in_one_line_with_the_nearest_name(capsys, words, told):
    status, out, err = run(capsys, "plan", *words)
    assert status in (1, 2) and out == "" and err.count("\n") == 1
    assert told in err


def test_inspect_tells_what_was_saved_and_refuses_a_changed_file(capsys, tmp_path):
    model = digits_vit()
    adapter = weft.attach(
        model, weft.DVoRA(r=7, targets="attention", modules_to_save=["classifier"])
    )
    awake(adapter)
    adapter.save(tmp_path / "a")
    status, out, _ = run(capsys, "inspect", str(tmp_path / "a"), "--json", str(tmp_path / "i.json"))
    found = json.loads((tmp_path / "i.json").read_text())
    assert status == 0 and "DVoRA" in out and f"{adapter.num_parameters:,}" in out
    assert found["numbers"] == adapter.num_parameters and found["nbytes"] == adapter.nbytes
    assert found["readable_by_peft"] is False
    file = tmp_path / "a" / "adapter_model.safetensors"
    bits = bytearray(file.read_bytes())
    bits[-3] ^= 4
    file.write_bytes(bits)
    status, out, err = run(capsys, "inspect", str(tmp_path / "a"))
    assert status == 1 and "its bits have changed" in err


@pytest.mark.parametrize(
    "config",
    [
        weft.DoRA(r=3, alpha=5, targets="mlp", modules_to_save=["classifier"]),
        weft.VeRA(r=6, modules_to_save=["classifier"]),
        weft.Full(),
    ],
    ids=lambda c: type(c).__name__,
)
def test_merge_writes_a_plain_model_with_the_same_outputs(capsys, tmp_path, pixels, config):
    import transformers

    model = (
        digits_vit()
    )  # three classes, where the base has twenty: the head comes with the adapter
    adapter = weft.attach(model, config)
    awake(adapter)
    adapter.save(tmp_path / "a")
    with torch.no_grad():
        wanted = model.eval()(pixel_values=pixels).logits
        with weft.use(model, None):
            base = model(pixel_values=pixels).logits
    assert (wanted - base).abs().max() > 1e-2
    status, out, _ = run(
        capsys,
        "merge",
        "--model",
        "digits-vit",
        "--adapter",
        str(tmp_path / "a"),
        "--out",
        str(tmp_path / "merged"),
    )
    assert status == 0 and "outputs differ by" in out
    merged = transformers.AutoModelForImageClassification.from_pretrained(
        tmp_path / "merged"
    ).eval()
    assert not any("weft" in key for key in merged.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(merged(pixel_values=pixels).logits, wanted, rtol=1e-5, atol=1e-5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "merged"]


def test_merge_refuses_before_it_writes(capsys, tmp_path):
    model = digits_vit()
    weft.attach(model, weft.LoRA(r=2)).save(
        tmp_path / "headless"
    )  # a three-class model, and the head is not in the file
    full = tmp_path / "full"
    full.mkdir()
    (full / "x").touch()
    new = str(tmp_path / "m")
    for words, told in (
        (["--out", str(full)], "not empty"),
        (["--out", new, "--adapter", "none"], "does not exist"),
        (["--out", new, "--no-verify", "--tolerance", "1"], "--no-verify"),
    ):
        given = words if "--adapter" in words else [*words, "--adapter", str(tmp_path / "headless")]
        status, _, err = run(capsys, "merge", "--model", "digits-vit", *given)
        assert status in (1, 2) and told in err
    assert not (tmp_path / "m").exists()


def test_merge_refuses_weights_that_would_be_random(capsys, tmp_path):
    import transformers

    config = transformers.BertConfig(
        hidden_size=12,
        intermediate_size=20,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=30,
        max_position_embeddings=16,
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "bare")  # no classifier in it
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "bare")
    weft.attach(model, weft.LoRA(r=2)).save(tmp_path / "a")
    status, _, err = run(
        capsys,
        "merge",
        "--model",
        str(tmp_path / "bare"),
        "--adapter",
        str(tmp_path / "a"),
        "--out",
        str(tmp_path / "m"),
    )
    assert status == 1 and "classifier" in err and "random" in err and not (tmp_path / "m").exists()


def test_doctor_tries_every_method(capsys, tmp_path):
    status, out, _ = run(capsys, "doctor", "--json", str(tmp_path / "d.json"))
    found = json.loads((tmp_path / "d.json").read_text())
    assert status == 0 and torch.__version__.split("+")[0] in out
    assert set(found["self-test"]) == set(weft.methods.METHODS) and set(
        found["self-test"].values()
    ) == {"ok"}


def test_doctor_says_so_where_a_method_does_not_work(capsys, monkeypatch):
    monkeypatch.setattr(
        nn.Linear,
        "forward",
        lambda self, x: torch.full((len(x), self.out_features), float("nan"), requires_grad=True),
    )
    status, out, _ = run(capsys, "doctor")
    assert status == 1 and "failed" in out


def options_of(name):
    parser = argparse.ArgumentParser()
    importlib.import_module(f"weft.cli.{name}").add_arguments(parser)
    return parser._option_string_actions


WRITING = [(name, "--json") for name in COMMANDS if "--json" in options_of(name)]


@pytest.mark.parametrize(("name", "option"), [*WRITING, ("eval", "--outputs")])
def test_a_file_that_cannot_be_written_is_refused_before_any_work(name, option, capsys, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "no" / "x.json")
    for place, said in (
        (tmp_path, "is a directory; give a file"),
        (tmp_path / "no" / "x.json", "there is no directory"),
        (tmp_path / "link", "there is no directory"),
        ("/proc/x.json", "no file can be written in '/proc'"),
    ):
        status, out, err = run(capsys, name, option, str(place))
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert option in err and said in err


def test_looking_whether_a_file_can_be_written_leaves_everything_as_it_was(tmp_path):
    check = options_of("eval")["--json"].type
    (tmp_path / "old").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "old")
    os.mkfifo(tmp_path / "pipe")
    for name in ("old", "link", "pipe", "new"):
        assert check(str(tmp_path / name)) == tmp_path / name
    assert check("/dev/stdout") == Path("/dev/stdout")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "old", "pipe"]
    assert (tmp_path / "old").read_text() == "old"


def test_a_closed_pipe_is_no_error(tmp_path):
    done = subprocess.run(
        f"{sys.executable} -m weft plan --model digits-vit --method lora | head -1",
        shell=True,
        capture_output=True,
        text=True,
        cwd=Path(tmp_path),
        check=False,
    )
    assert done.returncode == 0 and done.stderr == ""
