"""Killed at any point, or out of space, the directory holds a checkpoint that loads: the old one or
the new one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from checkpoint_support import CONFIG, TENSORS, edit_config, refused

import weft
from support import awake, net
from weft.checkpoint import files

pytestmark = pytest.mark.skipif(os.name != "posix", reason="fork, kill and file limits are POSIX")


def run(scene: str, directory: Path) -> tuple[dict[str, Any], str]:
    """One scene of saving_and_dying.py, in a process of its own: what it saw, and what else it
    printed.
    """
    script = Path(__file__).with_name("saving_and_dying.py")
    done = subprocess.run(
        [sys.executable, str(script), scene, str(directory)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *said, last = done.stdout.splitlines()
    return json.loads(last), "\n".join(said)


def test_killed_at_forty_random_moments(tmp_path):
    found, _ = run("killed", tmp_path)
    assert len(found["seen"]) == 40
    assert set(found["seen"]) == {
        "small",
        "large",
    }  # the kills came in the midst of alternating saves
    assert found["left"] >= 1  # and some in the midst of writing
    assert found["finally"] == ["large", []]


def test_stopped_before_every_file_operation(tmp_path):
    found, _ = run("stopped", tmp_path)
    seen = found["seen"]
    assert len(seen) > 8
    assert seen == sorted(
        seen, reverse=True
    )  # small until the rename that counts, large from there on
    assert set(seen) == {"small", "large"}
    assert found["pending"] >= 1  # among them the moment between the two renames
    assert found["finally"] == []


def test_interrupted_between_the_renames_and_then_again(tmp_path):
    found, _ = run("twice", tmp_path)
    assert found == {"seen": ["large", "large", "small"], "finally": []}


def test_a_full_disk_leaves_the_old_checkpoint_and_nothing_else(tmp_path):
    found, said = run("full_disk", tmp_path)
    assert found == {"codes": [7, 7, 7, 7], "seen": ["small"]}
    assert said.count("could not be written") == 4
    assert "File too large" in said


def test_a_directory_that_may_not_be_written(tmp_path):
    with (
        tempfile.TemporaryDirectory() as folder
    ):  # pytest's own is closed to the user that the script becomes
        Path(folder).chmod(0o755)
        directory = Path(folder) / "out"
        found, said = run("read_only", directory)
    assert found == {"codes": [7], "seen": ["small"], "finally": []}
    assert "could not be written" in said
    assert "Permission denied" in said


def test_saving_and_reading_at_once(tmp_path):
    found, _ = run("together", tmp_path)
    assert found["codes"] == [0, 0]
    assert len(found["seen"]) == 100  # each whole, or the script had failed
    assert found["finally"] == []


@pytest.mark.parametrize("mixed", [False, True])
def test_a_file_that_is_replaced_while_it_is_read_is_read_again(mixed, tmp_path, monkeypatch):
    """The library opens it twice, so the header of one file may meet the numbers of the next."""
    module = sys.modules["weft.checkpoint.read"]
    whole, calls = module._read_files, []

    def read(*args):
        calls.append(args)
        if len(calls) > 1:
            return whole(*args)
        stored = whole(*args)
        weft.save(awake("DVoRA").model, tmp_path)
        if mixed:
            raise weft.CheckpointError("mixed")
        return stored

    weft.save(awake("LoRA").model, tmp_path)
    monkeypatch.setattr(module, "_read_files", read)
    assert type(weft.load(net(), tmp_path).config) is weft.DVoRA
    assert len(calls) == 2


def test_an_interrupt_from_the_keyboard_leaves_nothing(tmp_path, monkeypatch):
    a = awake("LoRA")
    weft.save(a.model, tmp_path)

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    for name in ("save_file", "flush"):
        with monkeypatch.context() as patch:
            patch.setattr(files, name, interrupt)
            with pytest.raises(KeyboardInterrupt):
                weft.save(a.model, tmp_path)
        assert sorted(p.name for p in tmp_path.iterdir()) == [CONFIG, TENSORS]
        weft.load(net(), tmp_path)


def test_an_edited_configuration_is_not_taken_for_an_interrupted_save(tmp_path):
    a = awake("LoRA")
    weft.save(a.model, tmp_path)
    hidden = tmp_path / ".weft-00000000"
    hidden.mkdir()
    (hidden / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 9}))
    edit_config(tmp_path, r=9)
    refused(net(), tmp_path, "r: 9 in it, 3 saved")


def test_replace_leaves_the_old_file_where_filling_fails(tmp_path):
    path = tmp_path / "table.json"
    files.replace(path, lambda p: p.write_text("old"))

    def fail(p: Path) -> None:
        p.write_text("half")
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        files.replace(path, fail)
    assert [p.name for p in tmp_path.iterdir()] == ["table.json"]
    assert path.read_text() == "old"
