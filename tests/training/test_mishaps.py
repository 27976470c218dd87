"""What goes wrong around a run: each is said by its name with its cure, and what was trained until
then is kept.
"""

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
import tiny
import torch

from weft.checkpoint import files
from weft.cli import main
from weft.errors import ConfigError, WeftError
from weft.training import from_dict, train
from weft.training.resume import newest


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mishaps")
    tiny.language_model(folder / "lm")
    tiny.encoder(folder / "bert")
    tiny.pairs(folder / "pairs.jsonl", 11)
    gc.collect()
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("weft.training.curves.draw", lambda *a: False)
        yield folder
    gc.unfreeze()


def config(place, out, **changes):
    plain = {
        "out": str(out),
        "model": {"path": str(place / "lm")},
        "method": {"name": "LoRA", "r": 2},
        "data": {"train": str(place / "pairs.jsonl")},
        "optim": {"lr": 1e-2, "warm_up": 0},
        "train": {"steps": 5, "batch": 4, "device": "cpu"},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        plain[section] = {**plain.get(section, {}), name: value} if name else value
    return from_dict(plain)


def tensors(out):
    return files.read_tensors(Path(out) / "adapter" / "adapter_model.safetensors")[0]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def status(out):
    return json.loads((Path(out) / "run.json").read_text())["status"]


def test_where_nothing_can_be_written_is_said_before_anything_is_loaded(
    place, tmp_path, monkeypatch
):
    monkeypatch.setattr("weft.training.run.open_data", lambda *a: pytest.fail("data was opened"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file is a file; give a directory"):
        train(config(place, tmp_path / "file" / "below"))
    monkeypatch.setattr(
        os, "access", lambda *a: False
    )  # the tests may run as root, who may write anywhere
    with pytest.raises(ConfigError, match=r"is not writable"):
        train(config(place, tmp_path / "new" / "run"))
    assert not (tmp_path / "new").exists()


def test_resume_where_no_run_is_begins_none(place, tmp_path):
    for out in (tmp_path / "nothing", tmp_path):
        with pytest.raises(ConfigError, match=r"has no run to resume\. Leave --resume out"):
            train(config(place, out), go_on=True)
    assert list(tmp_path.iterdir()) == []


def test_a_second_process_in_the_same_directory_is_refused(place, tmp_path):
    from weft.training.run_dir import RunDir

    with (
        RunDir(tmp_path / "o").alone(),
        pytest.raises(ConfigError, match="another process is training there"),
    ):
        train(config(place, tmp_path / "o"), stream=StringIO())
    train(config(place, tmp_path / "o"), stream=StringIO())


def test_a_directory_that_cannot_be_locked_is_said_to_be_so(tmp_path, monkeypatch):
    from weft.training.run_dir import RunDir

    def no_locks(handle, how):
        raise OSError("no locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with pytest.warns(UserWarning, match="cannot be locked .*no locks"), RunDir(tmp_path).alone():
        pass


def test_a_warm_up_that_never_ends_is_refused(place, tmp_path):
    with pytest.raises(ConfigError, match=r"optim.warm_up=500 is all of the 9 steps or more"):
        train(
            config(place, tmp_path / "o", optim__warm_up=500, train={"batch": 4, "device": "cpu"})
        )


@pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="mounts a small file system"
)
def test_a_full_disk_loses_nothing_and_says_so(place, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "none", str(small)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no file system may be mounted here")
    try:
        out = small / "run"
        what = config(place, out, train__steps=30, save__every=1)
        with pytest.raises(
            WeftError, match=r"Free some space, and continue with --resume|could not be written"
        ):
            train(what, stream=StringIO())
        held = newest(out / "checkpoints")
        assert held is not None and held[1] >= 1
        subprocess.run(
            ["mount", "-o", "remount,size=8m", str(small)], check=True, capture_output=True
        )
        train(what, go_on=True, stream=StringIO())
        roomy = tmp_path / "roomy"
        train(config(place, roomy, train__steps=30, save__every=1), stream=StringIO())
        assert same(tensors(out), tensors(roomy))
        steps = [
            row["step"] for row in map(json.loads, (out / "log.jsonl").read_text().splitlines())
        ]
        assert steps == list(range(1, 31))
    finally:
        subprocess.run(["umount", str(small)], check=False, capture_output=True)


@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_during_an_evaluation(place, tmp_path, monkeypatch, presses):
    from weft.training.trainer import AdapterTrainer

    kept = AdapterTrainer._answers

    def press(self):
        if self.state.global_step == 2:
            for _ in range(presses):
                os.kill(os.getpid(), signal.SIGINT)
        return kept(self)

    monkeypatch.setattr(AdapterTrainer, "_answers", press)
    more = {
        "data__eval": str(place / "pairs.jsonl"),
        "eval__every": 2,
        "eval__best": "loss",
        "save__every": 1,
    }
    said, what = StringIO(), config(place, tmp_path / "o", **more)
    if presses == 1:
        done = train(what, stream=said)
        assert (
            not done.finished
            and done.step == 2
            and "Stopping after this evaluation" in said.getvalue()
        )
    else:
        with pytest.raises(KeyboardInterrupt):
            train(what, stream=said)
        assert (
            "the newest whole checkpoint is of step 1, and --resume continues from there"
            in said.getvalue()
        )
    assert status(tmp_path / "o") == "interrupted"
    monkeypatch.undo()
    train(what, go_on=True, stream=StringIO())
    train(config(place, tmp_path / "whole", **more), stream=StringIO())
    assert same(tensors(tmp_path / "o"), tensors(tmp_path / "whole"))


@pytest.mark.parametrize("always", [False, True])
def test_a_metric_without_a_value_is_not_the_best_and_stops_nothing(
    place, tmp_path, monkeypatch, always
):
    from weft.training import losses

    scores = tmp_path / "scores.csv"
    scores.write_text(
        "sentence1,sentence2,label\n" + "".join(f"a {i},b {i},{i / 4}\n" for i in range(8))
    )
    kept, seen = losses.metric_values, []

    def first_is_nan(names, predicted, labels):
        seen.append(1)
        return {
            **kept(names, predicted, labels),
            **({"Pearson": float("nan")} if always or len(seen) == 1 else {}),
        }

    monkeypatch.setattr(losses, "metric_values", first_is_nan)
    said = StringIO()
    what = config(
        place,
        tmp_path / "o",
        model={"path": str(place / "bert"), "kind": "regression"},
        method={"name": "LoRA", "r": 2, "targets": ["query"]},
        data={"train": str(scores), "eval": str(scores)},
        eval__every=2,
        eval__best="Pearson",
    )
    done = train(what, stream=said)
    assert "eval.best=Pearson has no value at step 2" in said.getvalue()
    assert ("had no value at any evaluation; the last adapter is kept" in said.getvalue()) == always
    assert done.finished and (
        done.evaluation["step"] == 5 if always else done.evaluation["step"] > 2
    )


@pytest.mark.parametrize("patience", [None, 1])
def test_a_run_killed_while_it_wrote_its_result_is_finished_and_not_trained_further(
    place, tmp_path, patience
):
    """Five steps of three an epoch: another step would be there to take."""
    flipped = tmp_path / "flipped.csv"
    tiny.labelled(tmp_path / "yes.csv", 8)
    flipped.write_text(
        (tmp_path / "yes.csv")
        .read_text()
        .replace(",yes", ",?")
        .replace(",no", ",yes")
        .replace(",?", ",no")
    )
    more = (
        {}
        if patience is None
        else {
            "model__path": str(place / "bert"),
            "method__targets": ["query"],
            "data__train": str(tmp_path / "yes.csv"),
            "data__eval": str(flipped),
            "eval__every": 1,
            "eval__best": "loss",
            "eval__patience": 1,
            "train__steps": 20,
        }
    )
    out = tmp_path / "o"
    done = train(config(place, out, **more), stream=StringIO())
    assert (done.step < 20) if patience else (done.step == 5)
    held, rows = tensors(out), (out / "log.jsonl").read_text()
    record = json.loads((out / "run.json").read_text())
    shutil.rmtree(out / "adapter")
    (out / "run.json").write_text(json.dumps({**record, "status": "running"}))
    again = train(config(place, out, **more), go_on=True, stream=StringIO())
    assert again.step == done.step and again.finished and same(tensors(out), held)
    assert (out / "log.jsonl").read_text() == rows and status(out) == "finished"


def test_data_that_changed_meanwhile_is_named(place, tmp_path, capsys):
    data = Path(shutil.copy(place / "pairs.jsonl", tmp_path / "data.jsonl"))
    path = tmp_path / "c.yaml"
    path.write_text(
        json.dumps(
            {
                "out": str(tmp_path / "o"),
                "model": {"path": str(place / "lm")},
                "method": {"name": "LoRA", "r": 2},
                "data": {"train": str(data)},
                "train": {"steps": 4, "batch": 4, "device": "cpu"},
                "save": {"every": 2},
            }
        )
    )
    assert main(["train", str(path)]) == 0
    shutil.rmtree(tmp_path / "o" / "checkpoints" / "checkpoint-4")
    record = json.loads((tmp_path / "o" / "run.json").read_text())
    (tmp_path / "o" / "run.json").write_text(json.dumps({**record, "status": "running"}))
    data.write_text(data.read_text().replace("1 + 1", "1 + 2"))
    assert main(["train", str(path), "--resume"]) == 2
    assert "the training data differ" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("optim.learning_rate=1", "optim.learning_rate is not known"),
        ("trian.steps=3", "trian is not known. Nearest: train"),
        ("adapter.strat=x", "adapter.strat is not known. Nearest: adapter.start"),
        ("data.columns={prompt: Frage}", "names the column 'Frage', which does not exist"),
        ("save.keep=0", "save.keep=0: it must be 1 or more"),
    ],
)
def test_a_wrong_key_or_column_is_named(place, tmp_path, capsys, key, said):
    path = tmp_path / "c.yaml"
    path.write_text(
        json.dumps(
            {
                "out": str(tmp_path / "o"),
                "model": {"path": str(place / "lm")},
                "method": {"name": "LoRA"},
                "data": {"train": str(place / "pairs.jsonl")},
            }
        )
    )
    assert main(["train", str(path), "--set", key]) in (1, 2)
    assert said in capsys.readouterr().err and not (tmp_path / "o").exists()


def test_by_default_every_checkpoint_is_kept_so_that_there_is_something_to_analyze(place, tmp_path):
    train(config(place, tmp_path / "o", save__every=2), stream=StringIO())
    kept = sorted(path.name for path in (tmp_path / "o" / "checkpoints").iterdir())
    assert kept == ["checkpoint-2", "checkpoint-4", "checkpoint-5"]
