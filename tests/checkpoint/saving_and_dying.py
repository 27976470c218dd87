"""Run by test_atomic.py in a process of its own: children that save, and are killed, or cannot
write.

Two adapters take turns in one directory: "small" (LoRA, in peft's layout) and "large" (DVoRA, in
Weft's). What the directory holds afterwards is loaded and must be one of them, whole. Prints what
was seen, as JSON.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import weft

CONFIGS = {
    "small": weft.LoRA(r=3, alpha=5, targets=["0"]),
    "large": weft.DVoRA(r=5, targets=["0", "1"]),
}


def build() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(130, 90), nn.Linear(90, 70))


def values(config: Any, which: str) -> nn.Module:
    model = build()
    with torch.no_grad():
        for i, p in enumerate(weft.attach(model, config).parameters()):
            p.fill_(i + (0.25 if which == "small" else 0.5))
    return model


MODELS = {which: values(config, which) for which, config in CONFIGS.items()}


def state(directory: Path) -> str:
    """Which of the two the directory holds; an error where it is neither, or not whole."""
    adapter = weft.load(build(), directory)
    which = next(w for w, config in CONFIGS.items() if config == adapter.config)
    wanted = weft.adapters(MODELS[which])["default"].parameters()
    assert all(torch.equal(p, q) for p, q in zip(wanted, adapter.parameters(), strict=True))
    weft.inspect(directory)
    return which


def left_behind(directory: Path) -> list[str]:
    return sorted(
        p.name
        for p in directory.iterdir()
        if p.name not in ("adapter_model.safetensors", "adapter_config.json")
    )


def forked(work: Callable[[], Any]) -> int:
    """The process id of a child that does this and exits."""
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
        os._exit(0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(3)


def finished(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def in_a_loop(directory: Path, pipe: int) -> None:
    while True:
        for model in MODELS.values():
            weft.save(model, directory)
            os.write(pipe, b".")


def killed(directory: Path) -> dict[str, Any]:
    """SIGKILL at random moments after the first, second, ... of saves that alternate."""
    weft.save(MODELS["small"], directory)
    seen, left, chance = [], 0, random.Random(11)
    for _ in range(40):
        out, into = os.pipe()
        pid = forked(lambda into=into: in_a_loop(directory, into))
        for _ in range(chance.randint(0, 4)):
            os.read(out, 1)
        time.sleep(chance.uniform(0, 0.012))
        os.kill(pid, signal.SIGKILL)
        assert finished(pid) == -signal.SIGKILL
        os.close(out)
        os.close(into)
        left += bool(left_behind(directory))
        seen.append(state(directory))
    weft.save(MODELS["large"], directory)
    return {"seen": seen, "left": left, "finally": [state(directory), left_behind(directory)]}


def stopped(directory: Path) -> dict[str, Any]:
    """A child that saves the large over the small one exits at its n-th file operation, for every
    n.
    """
    armed: dict[str, int] = {}

    def hook(event: str, _: Any) -> None:
        if armed and event in (
            "open",
            "os.mkdir",
            "os.rename",
            "os.remove",
            "os.rmdir",
            "os.chmod",
            "shutil.rmtree",
        ):
            armed["left"] -= 1
            if not armed["left"]:
                os._exit(9)

    sys.addaudithook(hook)
    seen, pending = [], 0
    for n in range(1, 200):
        weft.save(MODELS["small"], directory)
        assert not left_behind(directory)

        def work(n: int = n) -> None:
            armed["left"] = n
            weft.save(MODELS["large"], directory)

        code = finished(forked(work))
        assert code in (0, 9), code
        report = weft.load(build(), directory).load_report
        pending += "interrupted" in str(report)
        seen.append(state(directory))
        if code == 0:
            break
    return {"seen": seen, "pending": pending, "finally": left_behind(directory)}


def twice(directory: Path) -> dict[str, Any]:
    """A save that was interrupted between its renames, and a second one that died at once."""
    weft.save(MODELS["small"], directory)
    kept = (directory / "adapter_config.json").read_bytes()
    weft.save(MODELS["large"], directory)
    hidden = directory / ".weft-00000000"
    hidden.mkdir()
    (directory / "adapter_config.json").rename(hidden / "adapter_config.json")
    (directory / "adapter_config.json").write_bytes(
        kept
    )  # the old configuration beside the new tensors
    first = state(directory)
    died = directory / ".weft-00000001"
    died.mkdir()
    (died / "adapter_config.json").write_text("{")
    (died / "adapter_model.safetensors").write_bytes(b"\0" * 9)
    second = state(directory)
    weft.save(MODELS["small"], directory)
    return {"seen": [first, second, state(directory)], "finally": left_behind(directory)}


def full_disk(directory: Path) -> dict[str, Any]:
    """No file may grow beyond some bytes, at every size at which a save can fail."""
    weft.save(MODELS["small"], directory)
    before = {p.name: p.read_bytes() for p in directory.iterdir()}
    size = (directory / "adapter_model.safetensors").stat().st_size
    messages = []

    def work(limit: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            weft.save(MODELS["large"], directory)
        except weft.CheckpointError as error:
            os.write(1, (str(error).replace("\n", " ") + "\n").encode())
            os._exit(7)

    for limit in (0, 100, 600, size // 4):
        messages.append(finished(forked(lambda limit=limit: work(limit))))
        assert {p.name: p.read_bytes() for p in directory.iterdir()} == before
    return {"codes": messages, "seen": [state(directory)]}


def read_only(directory: Path) -> dict[str, Any]:
    weft.save(MODELS["small"], directory)

    def work() -> None:
        if os.geteuid() == 0:  # whom no mode holds back
            os.setuid(65534)
        try:
            weft.save(MODELS["large"], directory)
        except weft.CheckpointError as error:
            os.write(1, (str(error).replace("\n", " ") + "\n").encode())
            os._exit(7)

    directory.chmod(0o555)
    code = finished(forked(work))
    directory.chmod(0o755)
    return {"codes": [code], "seen": [state(directory)], "finally": left_behind(directory)}


def together(directory: Path) -> dict[str, Any]:
    """Two processes save into one directory, and a third one reads it all the while."""
    weft.save(MODELS["small"], directory)

    def work() -> None:
        for _ in range(40):
            for model in MODELS.values():
                weft.save(model, directory)

    children = [forked(work) for _ in range(2)]
    seen = [state(directory) for _ in range(100)]
    codes = [finished(pid) for pid in children]
    return {"seen": seen, "codes": codes, "finally": left_behind(directory)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(globals()[sys.argv[1]](Path(sys.argv[2]))))
