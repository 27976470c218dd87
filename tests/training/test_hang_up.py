"""A terminal that closes during a run: the run saves a checkpoint before it ends."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
from io import StringIO

import pytest
from test_resume import config, place  # noqa: F401 - a fixture

from weft.training import train
from weft.training.callbacks import Stop
from weft.training.resume import newest


@pytest.fixture(autouse=True)
def _not_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGHUP")
def test_sighup_saves_and_stops(place, tmp_path, monkeypatch):  # noqa: F811
    from weft.training import log

    show = log.Log._show

    def hang_up(self, state, row):
        show(self, state, row)
        if row["step"] == 3:
            for _ in range(3):  # the kernel's and the shell's
                os.kill(os.getpid(), signal.SIGHUP)

    monkeypatch.setattr(log.Log, "_show", hang_up)
    before = signal.getsignal(signal.SIGHUP)
    done = train(config(place, tmp_path / "o"), stream=StringIO())
    assert signal.getsignal(signal.SIGHUP) is before
    assert not done.finished and newest(tmp_path / "o" / "checkpoints")[1] == done.step == 4


def test_under_nohup_a_sighup_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop = Stop(StringIO())
        stop.on_train_begin(None, None, None)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        stop.restore()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_terminal_that_closes(place, tmp_path):  # noqa: F811
    """The process is the leader of a terminal's session; then the other end is closed."""
    from weft.training.config import dump

    out = tmp_path / "o"
    path = tmp_path / "c.yaml"
    path.write_text(dump(config(place, out, train__steps=4000, save__every=4000)))
    master, slave = pty.openpty()
    code = (
        "import fcntl, os, sys, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
        f"from weft.cli import main; sys.exit(main(['train', {str(path)!r}]))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=slave, stdout=slave, stderr=slave, close_fds=True
    ) as process:
        os.close(slave)
        log = out / "log.jsonl"
        seen = b""
        while not (log.is_file() and log.stat().st_size):
            assert process.poll() is None, seen.decode()
            if select.select([master], [], [], 0.1)[0]:
                seen += os.read(master, 65536)
        os.close(master)
        assert process.wait(120) == 130
    assert newest(out / "checkpoints") is not None
    assert json.loads((out / "run.json").read_text())["status"] == "interrupted"
