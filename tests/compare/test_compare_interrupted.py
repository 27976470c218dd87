"""A comparison that is killed, resumed, stopped with Ctrl-C and resumed again ends with the very
same scores.

In its last part a worker is killed, too.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
from comparing import TINY, Finished, states, stopped_at_work, trials_of, until, weft_command
from safetensors.torch import load_file

from weft.compare.run.study_location import StudyLocation

pytestmark = pytest.mark.timeout(
    300
)  # some 25 seconds on two free cores; four processes load their libraries


@dataclass(frozen=True)
class Story:
    out: Path
    killed: int
    kept: int
    orphans: int
    status: int
    said: str
    last: Finished


def _start(words: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "weft", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )


def _count(out: Path) -> int:
    """Finished runs."""
    return sum(state == "COMPLETE" for state, _ in states(StudyLocation(out)))


def _gone(workers: list[psutil.Process]) -> int:
    """How many of them are still there after a while."""
    return len(psutil.wait_procs(workers, timeout=30)[1])


def _kill_a_worker(out: Path, before: int) -> None:
    """As soon as the first further run is finished."""
    deadline = time.monotonic() + 120
    while _count(out) == before and time.monotonic() < deadline:
        time.sleep(0.005)
    for worker in psutil.Process().children()[:1]:
        worker.kill()


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    out = tmp_path_factory.mktemp("interrupted") / "some where"
    words = ["compare", "--out", str(out), *TINY]
    first = _start(words)
    until(lambda: _count(out) >= 3, first)
    until(lambda: stopped_at_work(first, StudyLocation(out)), first)
    workers = psutil.Process(first.pid).children(recursive=True)
    first.kill()
    first.communicate()
    orphans, kept = _gone(workers), _count(out)
    second = _start([*words, "--resume"])
    until(lambda: _count(out) >= kept + 2, second)
    until(lambda: stopped_at_work(second, StudyLocation(out)), second)
    os.kill(second.pid, signal.SIGINT)
    os.kill(second.pid, signal.SIGCONT)
    said = second.communicate(timeout=60)[1]
    killer = threading.Thread(target=_kill_a_worker, args=(out, _count(out)))
    killer.start()
    last = Finished(*weft_command(*shlex.split(said.splitlines()[-1])[1:]), out=out)
    killer.join()
    return Story(out, first.returncode, kept, orphans, second.returncode, said, last)


def test_workers_end_when_the_command_is_killed(story: Story) -> None:
    assert story.killed == -signal.SIGKILL
    assert story.kept >= 3
    assert story.orphans == 0


def test_ctrl_c_exits_with_130_and_says_how_to_go_on(story: Story) -> None:
    assert story.status == 130
    said = re.search(r"Interrupted\. (\d+) finished runs are stored in", story.said)
    assert said is not None
    assert story.kept + 2 <= int(said[1]) < len(story.last.runs)
    assert shlex.split(story.said.splitlines()[-1]) == [
        "weft",
        "compare",
        "--out",
        str(story.out),
        *TINY,
        "--resume",
    ]
    assert "Traceback" not in story.said


def test_a_worker_that_is_killed_leaves_no_gap(story: Story) -> None:
    assert story.last.status == 0, story.last.errors
    assert (
        len(list((story.out / "logs").iterdir())) == 3
    )  # two workers, and the one in place of the one killed


def test_a_resumed_comparison_has_bitwise_the_scores_of_an_uninterrupted_one(
    story: Story, finished: Finished
) -> None:
    resumed = story.last
    scores = {
        row["method"]: (row["scores"], row["lr"], row["bytes"]) for row in resumed.json["rows"]
    }
    assert scores == {
        row["method"]: (row["scores"], row["lr"], row["bytes"]) for row in finished.json["rows"]
    }
    assert set(resumed.runs) == set(finished.runs)
    for row, other in zip(resumed.json["rows"], finished.json["rows"], strict=True):
        ours = load_file(Path(row["adapter"]) / "adapter_model.safetensors")
        theirs = load_file(Path(other["adapter"]) / "adapter_model.safetensors")
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_nothing_is_trained_twice_and_every_attempt_is_told(story: Story) -> None:
    trials = trials_of(StudyLocation(story.out))
    complete = [trial.user_attrs["key"] for trial in trials if trial.state.name == "COMPLETE"]
    failed = [trial for trial in trials if trial.state.name == "FAIL"]
    assert len(complete) == len(set(complete)) == len(story.last.runs)
    assert len(complete) + len(failed) == len(trials)
    lost = [trial for trial in failed if not trial.user_attrs.get("released")]
    assert lost  # with the command that was killed, and perhaps with the worker that was
    assert any(trial.user_attrs.get("released") for trial in failed)  # Ctrl-C gave it back
    told = [run for row in story.last.json["rows"] for run in row["runs"] if run["attempts"] > 1]
    assert sum(len(run["earlier"]) for run in told) == len(lost)
    reasons = [reason for run in told for reason in run["earlier"]]
    assert any(re.match(r"the run was lost with process \d+ on ", reason) for reason in reasons)


def test_no_unfinished_file_is_left(story: Story) -> None:
    assert not list(story.out.rglob("*.tmp"))
