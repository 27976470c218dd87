"""Two processes share one study and one is killed: the other finishes everything, and nothing is
trained twice.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from comparing import RUNS, TINY, Finished, compare, states, stopped_at_work, trials_of, until

from weft.compare.run.study_location import StudyLocation, parse_study_url

pytestmark = pytest.mark.timeout(300)


@dataclass(frozen=True)
class Shared:
    location: StudyLocation
    words: list[str]
    killed: int
    survivor: int
    status: int
    said: str
    trials: list[Any]
    last: dict[str, Any]


def _start(out: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "weft",
            "compare",
            "--out",
            str(out),
            "--workers",
            "1",
            *TINY,
            *words,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )


def _of(trials: list[Any], pid: int, state: str) -> list[Any]:
    return [
        trial
        for trial in trials
        if trial.user_attrs["by"]["pid"] == pid and trial.state.name == state
    ]


@pytest.fixture(scope="module", params=["postgres", pytest.param("sqlite", marks=pytest.mark.slow)])
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Shared:
    folder = tmp_path_factory.mktemp("shared")
    if request.param == "postgres":
        url = f"{request.getfixturevalue('postgres')}#shared"
        location, words, outs = (
            StudyLocation(folder / "a", *parse_study_url(url)),
            ["--study", url],
            [folder / "a", folder / "b"],
        )
        first, second = (_start(out, *words) for out in outs)
    else:  # both in one directory
        location, words = StudyLocation(folder / "a"), []
        first = _start(folder / "a")
        until(lambda: bool(states(location)), first)
        second = _start(folder / "a", "--resume")
    until(
        lambda: {("COMPLETE", first.pid), ("COMPLETE", second.pid)} <= set(states(location)),
        first,
        second,
    )
    until(lambda: stopped_at_work(second, location), first, second)
    second.kill()
    second.communicate()
    said = first.communicate(timeout=240)[1]
    last = (
        json.loads((folder / "a" / "results.json").read_text(encoding="utf-8"))
        if first.returncode == 0
        else {}
    )
    return Shared(
        location, words, second.pid, first.pid, first.returncode, said, trials_of(location), last
    )


def test_the_other_finishes_everything(shared: Shared, finished: Finished) -> None:
    assert shared.status == 0, shared.said
    told = {row["method"]: (row["scores"], row["lr"], row["bytes"]) for row in shared.last["rows"]}
    assert told == {
        row["method"]: (row["scores"], row["lr"], row["bytes"]) for row in finished.json["rows"]
    }
    assert sum(len(row["runs"]) for row in shared.last["rows"]) == RUNS


def test_nothing_is_trained_twice(shared: Shared) -> None:
    complete = Counter(
        trial.user_attrs["key"] for trial in shared.trials if trial.state.name == "COMPLETE"
    )
    assert len(complete) == RUNS
    assert set(complete.values()) == {1}
    assert _of(shared.trials, shared.killed, "COMPLETE")
    assert _of(shared.trials, shared.survivor, "COMPLETE")
    assert not [trial for trial in shared.trials if trial.state.name not in ("COMPLETE", "FAIL")]


def test_the_run_in_work_was_taken_again_and_the_report_says_so(shared: Shared) -> None:
    lost = _of(shared.trials, shared.killed, "FAIL")
    assert len(lost) + RUNS == len(shared.trials)
    assert len(lost) == 1  # the killed process had one worker
    again = [run for row in shared.last["rows"] for run in row["runs"] if run["attempts"] > 1]
    assert [(run["attempts"], run["status"]) for run in again] == [(2, "finished")]
    assert f"the run was lost with process {shared.killed} on " in again[0]["earlier"][0]
    report = (shared.location.out / "report.md").read_text(encoding="utf-8")
    assert f"the run was lost with process {shared.killed}" in report
    assert "finished at a later attempt" in " ".join(
        (shared.location.out / "table.txt").read_text(encoding="utf-8").split()
    )
    assert "(elsewhere)" in shared.said
    assert "failed and is tried once more" in shared.said


def test_who_comes_later_gets_the_whole_table_and_trains_nothing(
    shared: Shared, tmp_path: Path
) -> None:
    if shared.location.url is None:
        return
    later = compare(tmp_path / "late", *TINY, *shared.words)
    assert later.status == 0, later.errors
    assert [row["scores"] for row in later.json["rows"]] == [
        row["scores"] for row in shared.last["rows"]
    ]
    assert len(trials_of(shared.location)) == len(shared.trials)
    assert "the adapter of its first seed is not here" in " ".join(later.printed.split())
    assert [row["adapter"] for row in later.json["rows"]] == [None, None]
    other = compare(tmp_path / "other", *TINY, *shared.words, "--head-lr", "0.02")
    assert (other.status, other.printed) == (2, "")
    assert (
        "--head-lr 0.01, and this one has 0.02. Give another name to --study (URL#NAME)"
        in other.errors
    )
