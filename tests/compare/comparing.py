"""Runs of `weft compare` for the tests: real ones, with a tiny budget."""

from __future__ import annotations

import contextlib
import io
import json
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weft.cli import main
from weft.compare.run.study_location import StudyLocation

# Two methods and three seeds: twelve training runs of eight steps.
TINY = (
    "--methods",
    "lora:r=3:alpha=5,bitfit",
    "--budget",
    "steps=96,batch=12,validation=60,test=150",
    "--lr",
    "lora=1e-2",
    "--lr",
    "bitfit=3e-3,1e-2",
)
RUNS = 12


@dataclass(frozen=True)
class Finished:
    """What a run of the command said and left."""

    status: int
    printed: str
    errors: str
    out: Path

    @property
    def json(self) -> dict[str, Any]:
        return json.loads((self.out / "results.json").read_text(encoding="utf-8"))

    @property
    def runs(self) -> dict[str, dict[str, Any]]:
        """What every finished run left in the study, by key."""
        return {
            trial.user_attrs["key"]: trial.user_attrs["result"]
            for trial in trials_of(StudyLocation(self.out))
            if trial.state.name == "COMPLETE"
        }


def trials_of(location: StudyLocation) -> list[Any]:
    """All trials of a study, as Optuna reads them."""
    from optuna import load_study
    from optuna.storages import RDBStorage

    url, keywords = location.engine_arguments()
    storage = RDBStorage(url, engine_kwargs=keywords)
    try:
        return load_study(study_name=location.name, storage=storage).trials
    finally:
        storage.remove_session()
        storage.engine.dispose()


OWNERS = """SELECT t.state, a.value_json FROM studies s JOIN trials t ON t.study_id = s.study_id
JOIN trial_user_attributes a ON a.trial_id = t.trial_id WHERE a.key = 'by' AND s.study_name = :name"""


def states(location: StudyLocation) -> list[tuple[str, int]]:
    """State and process number of every trial of a study, which may not be there yet."""
    from sqlalchemy import create_engine, text
    from sqlalchemy.exc import SQLAlchemyError

    if location.url is None and not location.file.is_file():
        return []
    url, keywords = location.engine_arguments()
    if location.url is None:  # a process that was stopped while it wrote would be waited for
        keywords["creator"] = lambda: sqlite3.connect(location.file, timeout=0.1)
    engine = create_engine(url, **keywords)
    try:
        with engine.connect() as connection:
            rows = connection.execute(text(OWNERS), {"name": location.name}).all()
        return [(str(state), json.loads(by)["pid"]) for state, by in rows]
    except SQLAlchemyError:  # the tables are not there yet, or the file is being written
        return []
    finally:
        engine.dispose()


def stopped_at_work(process: subprocess.Popen[str], location: StudyLocation) -> bool:
    """Whether the process, which has been stopped, has a run; if not it goes on."""
    process.send_signal(signal.SIGSTOP)
    if ("RUNNING", process.pid) in states(location):
        return True
    process.send_signal(signal.SIGCONT)
    return False


def until(condition: Callable[[], bool], *processes: subprocess.Popen[str]) -> None:
    """Wait, as long as the processes live."""
    deadline = time.monotonic() + 120
    while not condition():
        assert all(process.poll() is None for process in processes), [
            process.communicate() for process in processes
        ]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def weft_command(*words: str) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of the command, run in this process."""
    printed, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
        status = main(list(words))
    return status, printed.getvalue(), errors.getvalue()


def compare(out: Path, *words: str) -> Finished:
    """`weft compare` in this process; its workers are processes of their own all the same."""
    return Finished(*weft_command("compare", "--out", str(out), *words), out=out)
