"""Directories that are written whole: a full disk, a killed process, and what a user keeps beside."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
from checkpoint_support import CONFIG, TENSORS, llama

import weft
from support import awake
from weft.checkpoint.directories import is_taken, new_directory


def ran(code):
    """Runs in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=100
    )


def test_a_folder_of_the_user_stays_beside_the_adapter(tmp_path):
    model = awake("LoRA").model
    theirs = [".weft-notes", ".weft-01234567", ".weft-0123456g", ".weft-89abcdef"]
    for name in theirs:
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").write_text("mine")
    (tmp_path / ".weft-00000000").mkdir()  # of a killed save
    (tmp_path / ".weft-00000000" / TENSORS).write_bytes(b"half")
    (tmp_path / ".weft-22222222").mkdir()  # of one that was killed while safetensors wrote
    (tmp_path / ".weft-22222222" / ".tmpAb3dE6").write_bytes(b"half")
    (tmp_path / ".weft-11111111").write_text("a file")
    weft.save(model, tmp_path)
    found = sorted(p.name for p in tmp_path.iterdir())
    assert found == sorted([*theirs, ".weft-11111111", CONFIG, TENSORS])


DYING = {
    "before": "files.write = die",
    "hidden": "files._save_tensors = die",
    "renamed": "os.replace = die",
}


@pytest.mark.parametrize("moment", DYING)
def test_a_killed_export_does_not_block_the_next(moment, tmp_path):
    directory, out = weft.save(awake("LoRAFA").model, tmp_path / "a"), tmp_path / "out"
    code = (
        "import os, signal, weft; from weft.checkpoint import files\n"
        "def die(*_): os.kill(os.getpid(), signal.SIGKILL)\n"
        f"{DYING[moment]}\nweft.export({str(directory)!r}, 'lora', {str(out)!r})"
    )
    assert ran(code).returncode == -signal.SIGKILL
    assert weft.export(directory, "lora", out).to == "LoRA"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "out"]
    with pytest.raises(weft.CheckpointError, match="not empty"):
        weft.export(directory, "lora", out)


def test_what_an_earlier_version_left_of_a_killed_export_does_not_block(tmp_path):
    directory, out = weft.save(awake("LoRAFA").model, tmp_path / "a"), tmp_path / "out"
    (out / ".weft-0a1b2c3d").mkdir(parents=True)
    (out / ".weft-0a1b2c3d" / CONFIG).write_text("{}")
    weft.export(directory, "lora", out)
    assert sorted(p.name for p in out.iterdir()) == [CONFIG, TENSORS]


def test_a_living_one_is_left_alone(tmp_path):
    with new_directory(tmp_path / "out") as first:
        (first / "a").write_text("1")
        with new_directory(tmp_path / "out") as second:
            (second / "b").write_text("2")
            assert first.is_dir() and first != second
        assert (tmp_path / "out" / "b").exists() and is_taken(tmp_path / "out")
        (tmp_path / "out" / "b").unlink()
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["a"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(("command", "limit"), [("merge", 0), ("merge", 20_000), ("export", 600)])
def test_a_merge_or_an_export_on_a_full_disk_is_one_line(command, limit, tmp_path):
    base = llama()
    base.save_pretrained(tmp_path / "base")
    weft.attach(base, weft.LoRA(r=2)).save(tmp_path / "a")
    model = ["--model", str(tmp_path / "base")] if command == "merge" else ["--to", "peft"]
    words = [command, *model, "--adapter", str(tmp_path / "a"), "--out", str(tmp_path / "out")]
    done = ran(
        "import resource, signal, sys; from weft.cli import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        f"sys.exit(main({words!r}))"
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"weft {command}: ")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "base"]
