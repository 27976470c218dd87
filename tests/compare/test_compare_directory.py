"""The directory of a comparison, and files that are written whole."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import weft
from weft.compare.files import write_atomically
from weft.compare.run.directory import (
    adapter_name,
    check_directory,
    finished_runs,
    prepare_directory,
)
from weft.compare.run.study_location import StudyLocation

URL = "postgresql+psycopg://somebody:secret@nowhere.invalid/weft"


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a" / "x.json"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "new" * 10_000 + "\ud800")
    assert path.read_text() == "old"


def test_a_reader_sees_the_old_file_or_the_new_one_and_never_a_part(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_atomically(path, "old")
    with path.open() as reader:
        write_atomically(path, "new")
        assert (
            reader.read() == "old"
        )  # the new file took the name; the old one was not written into
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_half_written_files_of_dead_processes_are_swept_and_those_of_others_at_work_are_not(
    tmp_path: Path,
) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (tmp_path / "adapters").mkdir()
    for name in (
        f".x.json.{gone.pid}.tmp",
        f"adapters/.w.safetensors.{gone.pid}-00ab.tmp",
        f".y.json.{os.getpid()}.tmp",
    ):
        (tmp_path / name).write_text('{"status": "fin')
    prepare_directory(StudyLocation(tmp_path))
    assert [path.name for path in tmp_path.rglob("*.tmp")] == [f".y.json.{os.getpid()}.tmp"]


def test_places_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    check_directory(StudyLocation(tmp_path / "new"), resume=False)
    check_directory(StudyLocation(tmp_path), resume=False)
    (tmp_path / "logs").mkdir()
    (tmp_path / "study.lock").write_text("")
    check_directory(
        StudyLocation(tmp_path), resume=False
    )  # a comparison that failed before its first run left no more than this
    (tmp_path / "file").write_text("")
    with pytest.raises(weft.ConfigError, match="is a file"):
        check_directory(StudyLocation(tmp_path / "file"), resume=False)
    with pytest.raises(weft.ConfigError, match="has no comparison"):
        check_directory(StudyLocation(tmp_path), resume=True)
    (tmp_path / "sweep.json").write_text("{}")
    with pytest.raises(weft.ConfigError, match="an earlier version of Weft"):
        check_directory(StudyLocation(tmp_path), resume=True)


def test_what_is_there_needs_resume(tmp_path: Path) -> None:
    location = StudyLocation(tmp_path)
    assert finished_runs(location) == 0
    with pytest.raises(weft.ConfigError, match=r"has 0 finished runs\. Add --resume"):
        check_directory(location, resume=False)
    check_directory(location, resume=True)
    with pytest.raises(weft.ConfigError, match="its own study file"):
        check_directory(StudyLocation(tmp_path, URL), resume=True)


def test_a_directory_belongs_to_the_study_that_it_was_begun_with(tmp_path: Path) -> None:
    shared = StudyLocation(tmp_path, URL)
    prepare_directory(shared)
    assert "secret" not in (tmp_path / "study.txt").read_text()
    with pytest.raises(weft.ConfigError, match=r"has a comparison\. Add --resume"):
        check_directory(shared, resume=False)
    check_directory(shared, resume=True)
    with pytest.raises(weft.ConfigError, match=r"weft#weft-compare\. Add --study"):
        check_directory(StudyLocation(tmp_path), resume=True)
    with pytest.raises(weft.ConfigError, match=r"and this is .*weft#other"):
        check_directory(StudyLocation(tmp_path, URL, "other"), resume=True)


def test_no_two_runs_share_the_place_of_their_adapter() -> None:
    labels = [
        "LoRA",
        "LoRA r=4",
        "LoRA targets=['a']",
        "LoRA targets=('a',)",
        "LoRA targets=../../x",
        "x" * 300,
    ]
    names = {adapter_name(label, f"{number:016x}"[::-1]) for number, label in enumerate(labels)}
    assert len(names) == len(labels)
    assert all("/" not in name and len(name) < 80 for name in names)
    assert adapter_name("LoRA r=4", "0123456789abcdef") == "LoRA-r=4-01234567"
