"""Trains runs in processes of their own, kills them with SIGKILL, and goes on: a program, so that
it can fork before torch has made a thread.

    python killed.py FOLDER '[["LoRA", [3, 7]], ...]'      each method with the steps near which it is killed
    python killed.py FOLDER '[["LoRA", 20], ...]'          each with a number of kills, at any moment of a run

Prints {"<method>": [digest without interruption, digest after all kills and resumptions, kills that
hit]}; of the second form a list of digests, one for every run that came to its end, and how many of
the kills left a checkpoint half-written.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"], os.environ["TOKENIZERS_PARALLELISM"] = "1", "false"
warnings.simplefilter("ignore")

import torch

torch.set_num_threads(1)

import tiny

from weft.checkpoint import files
from weft.methods import METHODS
from weft.training import curves, run
from weft.training.config import from_dict

STEPS = 9
FIELDS = {"r": 3, "dropout": 0.1, "k": 1, "skip_layers": 0, "warm_up": 4, "final": 2}
os.fsync = lambda handle: (
    None
)  # a killed process loses no page that it wrote; only a machine that fails does
curves.draw = lambda *a: (
    False
)  # the picture is half of the time of so small a run, and has a test of its own


def config(folder, method, out, every=2):
    known = set(METHODS[method].__dataclass_fields__)
    fields = {k: v for k, v in FIELDS.items() if k in known}
    return from_dict(
        {
            "out": str(out),
            "model": {"path": str(folder / "model")},
            "method": {"name": method, **fields},
            "data": {"train": str(folder / "pairs.jsonl")},
            "optim": {"lr": 1e-2, "weight_decay": 0.01},
            "train": {"steps": STEPS, "batch": 2, "accumulate": 2, "device": "cpu"},
            "save": {"every": every},
        }
    )


def start(what, go_on=False):
    pid = os.fork()
    if pid:
        return pid
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    status = 1
    try:
        with Path(what.out).with_suffix(".log").open("a") as log:
            os.dup2(log.fileno(), 2)
            run.train(what, go_on, log)
        status = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(status)


def steps_logged(out):
    log = Path(out) / "log.jsonl"
    return log.read_text().count('"train"') if log.is_file() else 0


def kill_near(pid, out, step, chance):
    """SIGKILL when `step` lines are in the log and a moment has passed; False where the run was
    faster.
    """
    while steps_logged(out) < step:
        if os.waitpid(pid, os.WNOHANG)[0]:
            return False
        time.sleep(0.002)
    time.sleep(chance.random() * 0.05)
    os.kill(pid, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


def digest(out):
    """Of all tensors and what the header says of them; the header's own order is drawn anew by
    every process.
    """
    tensors, metadata = files.read_tensors(Path(out) / "adapter" / "adapter_model.safetensors")
    text = json.dumps(
        [sorted(metadata.items()), {name: files.checksum(t) for name, t in sorted(tensors.items())}]
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def case(folder, method, kills, chance):
    whole, broken = (
        config(folder, method, folder / f"{method}-{kind}") for kind in ("whole", "broken")
    )
    assert os.waitpid(start(whole), 0)[1] == 0, Path(whole.out).with_suffix(".log").read_text()
    hit = 0
    for place, step in enumerate(kills):
        hit += kill_near(start(broken, go_on=place > 0), broken.out, step, chance)
    assert os.waitpid(start(broken, go_on=True), 0)[1] == 0, (
        Path(broken.out).with_suffix(".log").read_text()
    )
    return [digest(whole.out), digest(broken.out), hit]


def ended_by(pid, moment):
    """How the process ended, by itself or, at that moment of the clock, by SIGKILL."""
    while time.monotonic() < moment:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]


def scattered(folder, method, kills, chance):
    """Kills at moments that are drawn over the whole length of a run, from its first file to its
    last.
    """
    whole = config(folder, method, folder / f"{method}-whole", every=1)
    began = time.monotonic()
    assert os.waitpid(start(whole), 0)[1] == 0, Path(whole.out).with_suffix(".log").read_text()
    length = time.monotonic() - began
    found, half, runs = [], 0, 0
    broken = None
    while kills or broken is not None:
        if broken is None:
            runs += 1
            broken = config(folder, method, folder / f"{method}-{runs}", every=1)
        out = Path(broken.out)
        fresh, began = not (out / "run.json").is_file(), time.monotonic()
        pid = start(broken, go_on=not fresh)
        status = ended_by(pid, began + chance.random() * length if kills else float("inf"))
        if os.WIFSIGNALED(status):
            kills -= 1
            half += any(
                not (path / "complete.json").is_file()
                for path in out.glob("checkpoints/checkpoint-*")
            )
            continue
        assert status == 0, out.with_suffix(".log").read_text()
        if fresh:
            length = min(
                length, time.monotonic() - began
            )  # of a machine that has less to do by now
        found.append(digest(broken.out))
        broken = None
    return [digest(whole.out), found, half]


def prepare(folder):
    """In a process of its own: building a model may make threads."""
    pid = os.fork()
    if not pid:
        tiny.language_model(folder / "model", biases=True, dropout=0.1)
        tiny.pairs(folder / "pairs.jsonl", 11)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0


def main(folder, cases):
    prepare(folder)
    print(
        json.dumps(
            {
                method: (scattered if isinstance(kills, int) else case)(
                    folder, method, kills, random.Random(method)
                )
                for method, kills in cases
            }
        )
    )


if __name__ == "__main__":
    import transformers.models.llama.modeling_llama
    import transformers.trainer  # noqa: F401

    from weft.training import loop  # noqa: F401 -- all before the forks, so that they share it

    gc.freeze()
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
