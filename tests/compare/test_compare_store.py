"""The directory of a comparison."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import weft
from weft.compare.store import Store, write_atomically


def test_what_is_added_is_there_for_the_next_process(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.add_run("ab", {"status": "finished", "losses": [0.1]})
    store.add_measure("cd", {"step_ratio": 1.5})
    store.add_adapter("LoRA", "ab")
    store.add_adapter("VeRA r=3", "ef")
    again = Store(tmp_path)
    assert again.runs() == {"ab": {"status": "finished", "losses": [0.1]}}
    assert again.measures() == {"cd": {"step_ratio": 1.5}}
    assert again.adapters() == {"LoRA": "ab", "VeRA r=3": "ef"}


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
        assert reader.read() == "old"  # the new file took the name; the old one was not written into
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_temporary_files_of_a_crash_are_swept_and_never_read(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / ".ab.json.77.tmp").write_text('{"status": "fin')
    store = Store(tmp_path)
    store.open({"task": "digits"})
    assert store.runs() == {}
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_damaged_run_is_named(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.add_run("ab", {"status": "finished"})
    (tmp_path / "runs" / "ab.json").write_text('{"status": "fin')
    with pytest.raises(weft.WeftError, match=re.escape(str(tmp_path / "runs" / "ab.json")) + ".*--resume"):
        store.runs()


def test_the_same_comparison_opens_again_and_another_is_refused(tmp_path: Path) -> None:
    Store(tmp_path).open({"task": "digits", "steps": 10})
    Store(tmp_path).open({"task": "digits", "steps": 10})
    with pytest.raises(weft.ConfigError, match=r"steps 10, and this one has 11"):
        Store(tmp_path).open({"task": "digits", "steps": 11})


def test_places_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    Store.check(tmp_path / "new", resume=False)
    Store.check(tmp_path, resume=False)
    (tmp_path / "logs").mkdir()
    Store.check(tmp_path, resume=False)  # a comparison that failed before its first run left no more than this
    (tmp_path / "file").write_text("")
    with pytest.raises(weft.ConfigError, match="is a file"):
        Store.check(tmp_path / "file", resume=False)
    with pytest.raises(weft.ConfigError, match="holds no comparison"):
        Store.check(tmp_path, resume=True)
    (tmp_path / "sweep.json").write_text("{}")
    with pytest.raises(weft.ConfigError, match="--resume"):
        Store.check(tmp_path, resume=False)
    Store.check(tmp_path, resume=True)


def test_no_two_labels_share_the_place_of_their_adapter(tmp_path: Path) -> None:
    labels = ["LoRA", "LoRA r=4", "LoRA r=4 alpha=8", "LoRA targets=['a']", "LoRA targets=('a',)", "LoRA targets=a/b",
              "LoRA targets=../../x", "DoRA targets={'q': {'r': 2}}"]
    paths = {Store(tmp_path).adapter_path(label) for label in labels}
    assert len(paths) == len(labels)
    assert {path.parent for path in paths} == {tmp_path / "adapters"}
    assert Store(tmp_path).adapter_path("LoRA").name == "LoRA"
