"""Several processes of one run, on the CPU: the same adapter as one process with as many samples a
step.
"""

import json
import os
import subprocess
import sys
from io import StringIO

import pytest
import tiny
import torch

from weft.checkpoint import files
from weft.training import from_dict, train


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_train_what_one_does(tmp_path):
    data = {
        "model": {"path": str(tiny.language_model(tmp_path / "lm"))},
        "method": {"name": "DyLoRA", "r": 3},
        "data": {
            "train": str(tiny.pairs(tmp_path / "pairs.jsonl", 12)),
            "eval": str(tmp_path / "pairs.jsonl"),
        },
        "optim": {"lr": 1e-2},
        "save": {"every": 4},
        "eval": {"best": "loss"},
    }
    train(
        from_dict(
            {
                **data,
                "out": str(tmp_path / "one"),
                "train": {"steps": 6, "batch": 4, "device": "cpu"},
            }
        ),
        stream=StringIO(),
    )
    out = tmp_path / "two"
    path = tmp_path / "two.yaml"
    path.write_text(
        json.dumps({**data, "out": str(out), "train": {"steps": 6, "batch": 2, "device": "cpu"}})
    )
    words = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        "29617",
        "-m",
        "weft",
        "train",
        str(path),
    ]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run(words, env=env, check=True)
    assert {p.name for p in (out / "checkpoints" / "checkpoint-6").glob("rng*")} == {
        "rng_state_0.pth",
        "rng_state_1.pth",
    }
    one, two = (
        files.read_tensors(tmp_path / name / "adapter" / "adapter_model.safetensors")[0]
        for name in ("one", "two")
    )
    assert all(torch.allclose(one[k], two[k], atol=1e-5) for k in one)
    record = json.loads((out / "run.json").read_text())
    assert record["identity"]["processes"] == 2 and record["status"] == "finished"
