"""Runs that were killed or stopped go on bit for bit, and only with what they were started with."""

import gc
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import tiny
import torch

from weft.checkpoint import files
from weft.errors import ConfigError
from weft.methods import METHODS, starts
from weft.training import from_dict, train
from weft.training.config import to_dict
from weft.training.resume import COMPLETE, is_whole, newest

HERE = Path(__file__).parent


def killed(folder, cases):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, sys.path)])}
    done = subprocess.run(
        [sys.executable, str(HERE / "killed.py"), str(folder), json.dumps(cases)],
        env=env,
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def check(found):
    assert {m: broken for m, (_, broken, _) in found.items()} == {
        m: whole for m, (whole, _, _) in found.items()
    }


def test_killed_and_resumed_is_bitwise_the_run_without_interruption(tmp_path):
    """One kill for the methods that carry most: draws, a budget, shared matrices, copies of base
    tensors, dropout.
    """
    found = killed(
        tmp_path,
        [[m, [step]] for m, step in (("DyLoRA", 3), ("AdaLoRA", 5), ("VeRA", 1), ("Full", 4))],
    )
    check(found)
    assert (
        sum(hits for _, _, hits in found.values()) >= 3
    )  # a run that ended before its kill shows nothing


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_method_killed_at_random_steps(tmp_path):
    chance = random.Random(4)
    found = killed(
        tmp_path, [[method, sorted(chance.sample(range(1, 9), 2))] for method in METHODS]
    )
    check(found)
    assert sum(hits for _, _, hits in found.values()) >= 20


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_twenty_random_moments_each(tmp_path):
    """At any moment: while it begins, in a step, while a checkpoint, a log line or the result is
    being written.
    """
    found = killed(
        tmp_path, [[method, 20] for method in ("LoRA", "DoRA", "VeRA", "AdaLoRA", "DyLoRA")]
    )
    assert {m: set(ends) for m, (_, ends, _) in found.items()} == {
        m: {whole} for m, (whole, _, _) in found.items()
    }
    assert sum(half for _, _, half in found.values()) >= 10, (
        found
    )  # of a hundred kills so many hit a save


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    tiny.language_model(folder / "model", dropout=0.1)
    tiny.pairs(folder / "pairs.jsonl", 11)
    gc.collect()
    # the Trainer collects garbage in every run, and all of transformers is there to be looked
    # through
    gc.freeze()
    yield folder
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="module")
def _no_picture():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("weft.training.curves.draw", lambda *a: False)
        yield


def config(place, out, **changes):
    data = {
        "out": str(out),
        "model": {"path": str(place / "model")},
        "method": {"name": "LoRA", "r": 2, "dropout": 0.1, "targets": ["q_proj", "v_proj"]},
        "data": {"train": str(place / "pairs.jsonl")},
        "optim": {"lr": 1e-2},
        "train": {"steps": 6, "batch": 2, "accumulate": 2, "device": "cpu"},
        "save": {"every": 2, "keep": 2},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        data[section] = {**data.get(section, {}), name: value}
    return from_dict(data)


@pytest.fixture(scope="module")
def whole(place):
    """A finished run, with checkpoints 4 and 6 kept."""
    out = place / "whole"
    train(config(place, out), stream=StringIO())
    return out


def tensors(out):
    return files.read_tensors(out / "adapter" / "adapter_model.safetensors")[0]


def unfinished(whole, out):
    """As if the run had been killed after step 4."""
    shutil.copytree(whole, out)
    shutil.rmtree(out / "checkpoints" / "checkpoint-6")
    shutil.rmtree(out / "adapter")
    return out


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_start_at_the_weight_is_resumed_from_the_file_and_not_computed_again(
    place, tmp_path, monkeypatch
):
    """Another machine decomposes a weight to other bits; with LoRA+ rates beside."""
    method = {"name": "DoRA", "r": 2, "init": "pissa", "targets": ["q_proj", "v_proj"]}
    changes = {"method": method, "optim": {"lr": 1e-2, "lora_plus": 4.0}}
    data = to_dict(config(place, tmp_path / "whole"))
    run = from_dict({**data, **changes})
    train(run, stream=StringIO())
    out = unfinished(tmp_path / "whole", tmp_path / "broken")
    real = starts.of_weight
    monkeypatch.setattr(
        "weft.methods.starts.of_weight", lambda *a: tuple(1.5 * t for t in real(*a))
    )
    assert train(replace(run, out=str(out)), go_on=True, stream=StringIO()).finished
    assert same(tensors(out), tensors(tmp_path / "whole"))


def test_ctrl_c_saves_says_how_to_go_on_and_stops(place, whole, tmp_path, monkeypatch):
    from weft.training import log

    show = log.Log._show

    def press(self, state, row):
        show(self, state, row)
        if row["step"] == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(log.Log, "_show", press)
    before, said = signal.getsignal(signal.SIGINT), StringIO()
    done = train(config(place, tmp_path / "o"), stream=said)
    assert signal.getsignal(signal.SIGINT) is before
    assert not done.finished and done.step == 4 and "Stopping after this step" in said.getvalue()
    assert newest(tmp_path / "o" / "checkpoints") == (
        tmp_path / "o" / "checkpoints" / "checkpoint-4",
        4,
    )
    assert not (tmp_path / "o" / "adapter").exists()
    monkeypatch.undo()
    assert train(config(place, tmp_path / "o"), go_on=True, stream=StringIO()).finished
    assert same(tensors(tmp_path / "o"), tensors(whole))
    steps = [
        json.loads(line)["step"] for line in (tmp_path / "o" / "log.jsonl").read_text().splitlines()
    ]
    assert steps == [1, 2, 3, 4, 5, 6]
    sessions = json.loads((tmp_path / "o" / "run.json").read_text())["sessions"]
    assert [s["from_step"] for s in sessions] == [0, 4]


def test_a_half_written_or_damaged_checkpoint_is_never_taken(place, whole, tmp_path):
    out = tmp_path / "o"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "adapter")
    (out / "checkpoints" / "checkpoint-6" / COMPLETE).unlink()
    assert newest(out / "checkpoints")[1] == 4
    train(config(place, out), go_on=True, stream=StringIO())
    assert same(tensors(out), tensors(whole))
    optimizer = out / "checkpoints" / "checkpoint-6" / "optimizer.pt"
    assert is_whole(optimizer.parent)
    held = bytearray(optimizer.read_bytes())
    held[len(held) // 2] ^= 1
    optimizer.write_bytes(bytes(held))
    assert not is_whole(optimizer.parent) and newest(out / "checkpoints")[1] == 4


def test_a_checkpoint_holds_the_adapter_and_not_the_base(whole):
    names = {p.name for p in (whole / "checkpoints" / "checkpoint-6").iterdir()}
    assert names == {
        "adapter_model.safetensors",
        "adapter_config.json",
        "weft_state.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
        COMPLETE,
    }
    assert [p.name for p in sorted((whole / "checkpoints").iterdir())] == [
        "checkpoint-4",
        "checkpoint-6",
    ]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"optim__lr": 2e-2}, r"optim.lr=0.01, and this one has 0.02"),
        ({"method__r": 3}, r"method.r=2, and this one has 3"),
        ({"train__seed": 1}, "train.seed=0"),
        ({"data__train": "other.jsonl"}, "the training data differ"),
        ({"model__path": "other"}, "the model's weights differ"),
    ],
)
def test_another_run_is_not_gone_on_with(place, whole, tmp_path, changes, said):
    if "data__train" in changes:
        changes = {"data__train": str(tiny.pairs(tmp_path / "other.jsonl", 12))}
    if "model__path" in changes:
        torch.manual_seed(9)
        changes = {"model__path": str(shutil.copytree(place / "model", tmp_path / "other"))}
        weights = tmp_path / "other" / "model.safetensors"
        held, metadata = files.read_tensors(weights)
        held["model.norm.weight"][3] += 1e-3
        from safetensors.torch import save_file

        save_file(held, weights, metadata)
    with pytest.raises(ConfigError, match=said):
        train(
            config(place, unfinished(whole, tmp_path / "o"), **changes),
            go_on=True,
            stream=StringIO(),
        )


def test_the_same_data_elsewhere_and_other_log_settings_are_the_same_run(place, whole, tmp_path):
    moved = shutil.copy(place / "pairs.jsonl", tmp_path / "moved.jsonl")
    out = unfinished(whole, tmp_path / "o")
    train(config(place, out, data__train=str(moved), log__every=2), go_on=True, stream=StringIO())
    assert same(tensors(out), tensors(whole))


def test_a_directory_with_a_run_wants_resume_and_one_with_something_else_is_refused(
    place, whole, tmp_path
):
    with pytest.raises(ConfigError, match=r"has a run. Add --resume"):
        train(config(place, whole))
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match="is not empty and has no run"):
        train(config(place, tmp_path))
