"""Where a file is written to that is there already: links, devices, FIFOs and modes stay as they are."""

import json
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import weft
from support import awake
from weft.checkpoint.files import replace
from weft.cli import main


def write(path, text="new"):
    replace(path, lambda temporary: temporary.write_text(text))


def test_a_link_stays_and_its_file_is_replaced(tmp_path):
    (tmp_path / "there").mkdir()
    target, link = tmp_path / "there" / "data.json", tmp_path / "link.json"
    for text in ("old", None):  # None: the link leads to nothing yet
        target.unlink(missing_ok=True)
        link.unlink(missing_ok=True)
        if text is not None:
            target.write_text(text)
        link.symlink_to("there/data.json")
        write(link)
        assert link.is_symlink() and target.read_text() == "new"
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["data.json", "link.json", "there"]


def test_the_mode_of_a_file_stays(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    path.chmod(0o600)
    write(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and path.read_text() == "new"


def test_a_fifo_is_written_to(tmp_path):
    path, read = tmp_path / "fifo", []
    os.mkfifo(path)
    thread = threading.Thread(target=lambda: read.append(path.read_text()))
    thread.start()
    write(path)
    thread.join()
    assert read == ["new"] and stat.S_ISFIFO(path.stat().st_mode)


def test_a_link_to_a_device_is_written_to(tmp_path):
    for device, works in (("/dev/null", True), ("/dev/full", False)):
        link = tmp_path / device[5:]
        link.symlink_to(device)
        if works:
            write(link)
        else:
            with pytest.raises(OSError, match="No space left"):
                write(link)
        assert link.is_symlink() and stat.S_ISCHR(Path(device).stat().st_mode)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_loop_of_links_is_an_error(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match="symbolic links"):
        write(tmp_path / "a")
    assert (tmp_path / "a").is_symlink() and (tmp_path / "b").is_symlink()


def test_a_full_device_is_one_line_of_the_command(tmp_path, capsys):
    weft.save(awake("LoRA").model, tmp_path / "a")
    (tmp_path / "full").symlink_to("/dev/full")
    assert main(["inspect", str(tmp_path / "a"), "--json", str(tmp_path / "full")]) == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("into", ["pipe", "file"])
def test_the_standard_output(into, tmp_path):
    code = (
        "from weft.checkpoint.files import replace; from pathlib import Path; import sys; "
        "print('before', flush=True); "
        "replace(Path('/dev/stdout'), lambda p: p.write_text('{\"a\": 1}\\n')); print('after')"
    )
    with (tmp_path / "out").open("w") as file:
        done = subprocess.run(
            [sys.executable, "-c", code],
            stdout=file if into == "file" else subprocess.PIPE,
            text=True,
            check=True,
        )
    text = (tmp_path / "out").read_text() if into == "file" else done.stdout
    lines = text.splitlines()
    assert json.loads(lines.pop(1)) == {"a": 1} and lines == ["before", "after"]


def test_a_file_in_memory_is_replaced():
    folder = Path("/dev/shm")
    if not os.access(folder, os.W_OK):
        pytest.skip("no /dev/shm")
    path = folder / f"weft-test-{os.getpid()}"
    try:
        for text in ("old", "new"):
            write(path, text)
        assert path.read_text() == "new"
    finally:
        path.unlink()
