"""What Weights & Biases and MLflow get of a run, where they are installed; a package that is not
there is named.
"""

import importlib.util
import json
import os
import sqlite3
import subprocess
import sys

import pytest
import tiny

RUN = """
import sys
from weft.training import from_dict, train
import json
for out in json.loads(sys.argv[2]):
    config = json.loads(sys.argv[1])
    try:
        train(from_dict({**config, "out": out}))
    except Exception as error:
        print("failed:", error)
"""


def needs(name):
    return pytest.mark.skipif(
        importlib.util.find_spec(name) is None, reason=f"{name} is not installed"
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reports")
    tiny.language_model(folder / "lm")
    tiny.pairs(folder / "pairs.jsonl", 8)
    return folder


def runs(place, folder, reporter, env, outs=("a", "b"), **optim):
    """Two runs of one process, in a process of their own: the packages warn, start threads and
    patch things.
    """
    config = {
        "model": {"path": str(place / "lm")},
        "method": {"name": "LoRA", "r": 3},
        "data": {"train": str(place / "pairs.jsonl"), "eval": str(place / "pairs.jsonl")},
        "optim": {"warm_up": 0, **optim},
        "train": {"steps": 4, "batch": 4, "device": "cpu"},
        "log": {"report_to": [reporter]},
    }
    words = [
        sys.executable,
        "-c",
        RUN,
        json.dumps(config),
        json.dumps([str(folder / out) for out in outs]),
    ]
    path = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        words,
        cwd=folder,
        text=True,
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path, **env},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.mark.slow
@needs("mlflow")
def test_mlflow_has_the_configuration_the_curves_and_an_end(place, tmp_path):
    env = {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path / 'mlflow.db'}"}
    runs(place, tmp_path, "mlflow", env)
    assert "failed:" in runs(place, tmp_path, "mlflow", env, outs=["c"], lr=1e30, clip=0)
    with sqlite3.connect(tmp_path / "mlflow.db") as store:  # mlflow itself warns of what it imports
        found = {
            name: (key, status)
            for key, name, status in store.execute("select run_uuid, name, status from runs")
        }
        assert {name: status for name, (_, status) in found.items()} == {
            "a": "FINISHED",
            "b": "FINISHED",
            "c": "FAILED",
        }
        key = found["b"][0]
        said = dict(store.execute("select key, value from params where run_uuid = ?", (key,)))
        curves = {
            name: dict(
                store.execute(
                    "select step, value from metrics where run_uuid = ? and key = ?", (key, name)
                )
            )
            for name in ("loss", "eval_loss")
        }
    store.close()
    assert (
        said["weft.method.name"] == "LoRA"
        and said["weft.method.r"] == "3"
        and said["weft.out"] == str(tmp_path / "b")
    )
    logged = [json.loads(line) for line in (tmp_path / "b" / "log.jsonl").read_text().splitlines()]
    for name, kind in (("loss", "train"), ("eval_loss", "eval")):
        assert curves[name] == pytest.approx(
            {row["step"]: row["loss"] for row in logged if row["kind"] == kind}
        )


@pytest.mark.slow
@needs("wandb")
def test_wandb_has_the_configuration_the_curves_and_an_end(place, tmp_path):
    runs(place, tmp_path, "wandb", {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path)})
    kept = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert len(kept) == 2  # the second run of a process is not written into the first
    for folder in kept:
        data = next(folder.glob("*.wandb")).read_bytes()
        assert (
            b"weft" in data
            and b"LoRA" in data
            and b"eval/loss" in data
            and b"train/grad_norm" in data
        )
