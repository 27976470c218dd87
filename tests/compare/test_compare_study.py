"""Claims, attempts and results in a study: in a SQLite file and in a real PostgreSQL database."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
from comparing import trials_of

import weft
from weft.compare.plan.sweep import RunSpec
from weft.compare.run.study import State, Study
from weft.compare.run.study_location import StudyLocation, parse_study_url

IDENTITY = {"task": "digits", "steps": 10}
FAILED = {"status": "failed", "reason": "DivergedError: the loss became nan"}
Open = Callable[..., Study]


def spec(seed: int = 0) -> RunSpec:
    return RunSpec("LoRA", {"method": "LoRA"}, 1e30, 1e-2, seed, 10, 4, "tune")


def result(score: float = 0.75) -> dict[str, Any]:
    return {
        "status": "finished",
        "validation": {"score": score, "loss": 1.0},
        "losses": [0.1, float("inf")],
        "spec": {},
    }


@pytest.fixture(params=["sqlite", "postgres"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> StudyLocation:
    folder = tmp_path / "wh{a}t ?#%"
    if request.param == "sqlite":
        return StudyLocation(folder)
    url, name = parse_study_url(f"{request.getfixturevalue('postgres')}#{request.node.name}")
    return StudyLocation(folder, url, name)


@pytest.fixture
def open_study(location: StudyLocation) -> Any:
    """Studies as several processes would have them."""
    with ExitStack() as stack:

        def opened(**settings: Any) -> Study:
            study = stack.enter_context(closing(Study(location, **settings)))
            study.open(IDENTITY)
            return study

        yield opened


def test_a_run_is_claimed_once_and_its_result_is_there_for_all(open_study: Open) -> None:
    one, two = open_study(), open_study()
    assert one.claim(spec(), "ab")
    assert not two.claim(spec(), "ab")
    assert two.claim(spec(1), "cd")
    assert two.refresh() == State({}, frozenset({"ab", "cd"}), {})
    assert one.finish("ab", result())
    state = two.refresh()
    assert state.done == {"ab": {**result(), "attempts": 1, "earlier": []}}
    assert state.busy == {"cd"}
    assert not two.claim(spec(), "ab")
    assert (one.count(), two.count()) == (1, 1)


def test_optuna_reads_what_was_kept(open_study: Open, location: StudyLocation) -> None:
    study = open_study()
    study.claim(spec(7), "ab")
    study.finish("ab", result(0.5))
    study.claim(spec(8), "cd")
    study.finish(
        "cd", result(float("nan"))
    )  # a score that is not a number is a result all the same
    first, second = trials_of(location)
    assert (first.state.name, first.value) == ("COMPLETE", 0.5)
    assert first.params == {"lr": 1e30, "seed": 7, "purpose": "tune"}
    assert (first.user_attrs["label"], first.user_attrs["key"], first.user_attrs["result"]) == (
        "LoRA",
        "ab",
        result(0.5),
    )
    assert (second.state.name, second.value) == ("COMPLETE", None)


def test_a_run_that_fails_is_tried_once_more_and_then_failed_until_a_retry(
    open_study: Open,
) -> None:
    study = open_study()
    study.claim(spec(), "ab")
    study.finish("ab", FAILED)
    state = study.refresh()
    assert (state.done, list(state.retrying)) == ({}, ["ab"])
    assert study.claim(spec(), "ab")
    study.finish("ab", {**FAILED, "reason": "other"})
    last = study.refresh().done["ab"]
    assert (last["status"], last["reason"], last["attempts"]) == (
        "failed",
        "other (tried 2 times)",
        2,
    )
    assert last["earlier"] == [FAILED["reason"]]
    assert not study.claim(spec(), "ab")
    assert (study.retry(), study.retry()) == (1, 0)
    assert study.claim(spec(), "ab")
    study.finish("ab", result())
    assert study.refresh().done["ab"] == {
        **result(),
        "attempts": 3,
        "earlier": [FAILED["reason"], "other"],
    }


def test_what_is_given_back_is_free_and_was_no_attempt(
    open_study: Open, location: StudyLocation
) -> None:
    for _ in range(3):
        with Study(location) as stopped:
            stopped.open(IDENTITY)
            assert stopped.claim(spec(), "ab")
    study = open_study()
    assert study.refresh() == State()
    assert study.claim(spec(), "ab")
    study.finish("ab", result())
    assert study.refresh().done["ab"]["attempts"] == 1


CLAIM = """
import json, os, signal, sys
from pathlib import Path
from weft.compare.run.study_location import StudyLocation
from weft.compare.plan.sweep import RunSpec
from weft.compare.run.study import Study
out, url, name, spec, identity = json.loads(sys.argv[1])
study = Study(StudyLocation(Path(out), url, name))
study.open(identity)
assert study.claim(RunSpec(**spec), "ab")
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_run_of_a_process_that_was_killed_is_free_at_once_and_tells_it(
    open_study: Open, location: StudyLocation
) -> None:
    words = [str(location.out), location.url, location.name, vars(spec()), IDENTITY]
    killed = subprocess.Popen([sys.executable, "-c", CLAIM, json.dumps(words)])
    assert killed.wait(120) == -9
    study = open_study()
    state = study.refresh()
    assert not state.busy
    assert re.fullmatch(
        rf"the run was lost with process {killed.pid} on \S+", state.retrying["ab"]["reason"]
    )
    assert study.claim(spec(), "ab")
    study.finish("ab", result())
    done = study.refresh().done["ab"]
    assert (done["attempts"], len(done["earlier"])) == (2, 1)


def test_a_claim_from_another_machine_lasts_as_long_as_its_heart_beats(
    open_study: Open, location: StudyLocation
) -> None:
    far, near = open_study(heartbeat=1, grace=2), open_study(heartbeat=1, grace=2)
    far._owner = {**far._owner, "machine": "elsewhere", "pid": 1}
    far.__enter__()
    assert far.claim(spec(), "ab")
    time.sleep(4)
    assert near.refresh().busy == {"ab"}
    far._stop.set()  # as if the machine were switched off
    deadline = time.monotonic() + 30
    while near.refresh().busy and time.monotonic() < deadline:
        time.sleep(0.2)
    assert near.claim(spec(), "ab")
    assert not far.finish("ab", result())  # it comes back, and has lost the run
    assert near.finish("ab", result(0.25))
    assert far.refresh().done["ab"]["validation"]["score"] == 0.25


def test_a_process_that_dies_between_writing_a_trial_and_having_it_blocks_nobody(
    open_study: Open, location: StudyLocation, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = open_study(), open_study()
    monkeypatch.setattr(one._storage, "record_heartbeat", lambda trial: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        one.claim(spec(), "ab")
    assert two.claim(spec(), "ab")
    two.finish("ab", result())
    assert two.refresh().done["ab"]["attempts"] == 1
    assert len(trials_of(location)) == 1


def test_many_that_reach_for_the_same_runs_share_them(open_study: Open) -> None:
    studies = [open_study() for _ in range(4)]
    got: list[list[str]] = [[] for _ in studies]
    start = threading.Barrier(len(studies))

    def reach(number: int) -> None:
        start.wait()
        for seed in range(5):
            if studies[number].claim(spec(seed), str(seed)):
                got[number].append(str(seed))

    threads = [threading.Thread(target=reach, args=(number,)) for number in range(len(studies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(key for keys in got for key in keys) == ["0", "1", "2", "3", "4"]


def test_another_comparison_is_refused_and_measures_are_kept(
    open_study: Open, location: StudyLocation
) -> None:
    study = open_study()
    study.add_measure("ab", {"step_ratio": 1.5})
    assert open_study().measures() == {"ab": {"step_ratio": 1.5}}
    with (
        closing(Study(location)) as other,
        pytest.raises(weft.ConfigError, match="steps 10, and this one has 11") as said,
    ):
        other.open({**IDENTITY, "steps": 11})
    assert str(location) in str(said.value)


def test_optuna_says_nothing(open_study: Open, capfd: pytest.CaptureFixture[str]) -> None:
    study = open_study()
    study.claim(spec(), "ab")
    study.finish("ab", result())
    study.refresh()
    assert capfd.readouterr() == ("", "")


def test_a_file_that_is_no_study_and_a_database_that_is_not_there_are_named(tmp_path: Path) -> None:
    (tmp_path / "study.db").write_bytes(b"x" * 4096)
    with pytest.raises(
        weft.WeftError, match=re.escape(f"the study {tmp_path / 'study.db'} cannot be used: ")
    ):
        Study(StudyLocation(tmp_path))
    pytest.importorskip("psycopg")
    url, name = parse_study_url(f"postgresql://u:secret@/db?host={tmp_path}#mine")
    with pytest.raises(
        weft.WeftError, match=r"the study postgresql\+psycopg://u:\*\*\*@/db\S+#mine cannot be used"
    ) as said:
        Study(StudyLocation(tmp_path / "out", url, name))
    assert "secret" not in str(said.value)
