"""A whole training run as a user starts it: `weft train` beside a script with
`transformers.Trainer` and `peft`, each from the start of its process to its end.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from .. import shared
from ..contenders import IdleError, split
from ..memory import ROOT
from ..setup import Setup, build
from ..timing import Rounds, Work, interleave

STEPS, BATCH, LR, ALPHA, MAX_LENGTH = 60, 8, 2e-4, 16, 256
WARM_STEPS = 3  # the fewest that the audit of `weft train` accepts
KEYS = ("trained", "tokens", "steps")  # that must be the same on both sides


def measure(
    setup: Setup, contenders: tuple[str, ...], rounds: Rounds, steps: int = STEPS
) -> dict[str, Any]:
    """Metric: process, seconds of a whole process. "weft.METHOD:r" or "peft.METHOD:r".

    One epoch (`steps` is 3 or more) over `steps` * 8 pairs; both sides write a log of every step, one checkpoint and the
    adapter. Raises IdleError if two contenders of a method trained on different numbers or tokens.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kind = shared.write_pairs(folder / "pairs.jsonl", steps * BATCH)
        model = _model_folder(setup, folder, steps)
        works: dict[str, Work] = {}
        seen: dict[str, dict[str, int]] = {}
        for contender in contenders:
            works[contender] = _work(contender, setup, model, folder, steps, seen)
        for contender in contenders[:2]:  # fills the system's cache of files
            _work(contender, setup, model, folder, WARM_STEPS, {})()
        samples = interleave(works, replace(rounds, warm=0))
        _check(seen)
        note = f"{setup.model}, {kind}, {steps} steps of {BATCH} rows, r=8"
        return {"samples": samples, "notes": [note]}


def _model_folder(setup: Setup, folder: Path, steps: int) -> Path:
    if setup.model == "stories15m":
        return shared.STORIES
    rows, _ = shared.pairs(steps * BATCH)
    shared.write_model(build(setup), folder / "model", rows)
    return folder / "model"


def _work(
    name: str, setup: Setup, model: Path, folder: Path, steps: int, seen: dict[str, dict[str, int]]
) -> Work:
    side, method, own = split(name, setup)
    if side not in ("weft", "peft") or method not in ("LoRA", "DoRA"):
        raise ValueError(f"{name!r} cannot be trained; write weft or peft, and LoRA or DoRA.")
    out = folder / f"{name.replace(':', '-')}-{steps}"
    prepare = _weft if side == "weft" else _peft
    words = prepare(method, own, model, folder / "pairs.jsonl", out, steps)
    threads = setup.threads or torch.get_num_threads()
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}

    def run() -> Mapping[str, float]:
        shutil.rmtree(out, ignore_errors=True)
        started = perf_counter()
        done = process(words, environment)
        seconds = perf_counter() - started
        if done.returncode != 0:
            raise RuntimeError(f"{name} failed:\n{done.stderr[-2000:]}")
        seen[name] = _weft_result(out) if side == "weft" else json.loads(_last(done.stdout))
        return {"process": seconds}

    return run


def process(
    words: tuple[str, ...], environment: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """Runs `python -m WORDS` and returns when it has ended."""
    return subprocess.run(
        [sys.executable, "-m", *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def _last(text: str) -> str:
    return text.strip().splitlines()[-1]


def _weft(
    method: str, setup: Setup, model: Path, pairs: Path, out: Path, steps: int
) -> tuple[str, ...]:
    config = {
        "out": str(out),
        "model": {"path": str(model)},
        "method": {"name": method, "r": setup.r, "alpha": ALPHA},
        "data": {"train": str(pairs), "max_length": MAX_LENGTH},
        "optim": {"lr": LR, "warm_up": 0},
        "train": {"steps": steps, "batch": BATCH, "device": "cpu"},
    }
    path = out.with_name(f"{out.name}.yaml")
    path.write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    return "weft", "train", str(path)


def _peft(
    method: str, setup: Setup, model: Path, pairs: Path, out: Path, steps: int
) -> tuple[str, ...]:
    asked = {
        "model": str(model),
        "data": str(pairs),
        "out": str(out),
        "steps": steps,
        "batch": BATCH,
        "lr": LR,
        "r": setup.r,
        "alpha": ALPHA,
        "dora": method == "DoRA",
        "max_length": MAX_LENGTH,
    }
    return "benchmarks.peft_train", json.dumps(asked)


def _weft_result(out: Path) -> dict[str, int]:
    record = json.loads((out / "run.json").read_text(encoding="utf-8"))
    lines = (out / "log.jsonl").read_text(encoding="utf-8").splitlines()
    last = json.loads(lines[-1])
    return {
        "trained": record["trained_numbers"],
        "tokens": last["tokens"],
        "steps": record["steps_done"],
    }


def _check(seen: Mapping[str, Mapping[str, int]]) -> None:
    first: dict[str, tuple[str, Mapping[str, int]]] = {}
    for name, found in seen.items():
        method = name.partition(".")[2]
        other, wanted = first.setdefault(method, (name, found))
        if any(found[key] != wanted[key] for key in KEYS):
            raise IdleError(f"{name} trained on {dict(found)}, and {other} on {dict(wanted)}.")
