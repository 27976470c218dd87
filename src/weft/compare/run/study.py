"""The runs of a comparison as an Optuna study: one trial per attempt, with the run's result.

A trial's parameters are learning rate, seed and purpose; its value is the validation score. Its
user attributes are the run's key and label, the process that claimed it, and the result. Optuna
suggests nothing here: plan/sweep.py decides which runs there are. Optuna stores them, so that
processes on one or many machines can share them.

A process claims a run under a lock, so no two processes run the same one. If a process ends, it
loses its claims: at once on this machine, elsewhere after Optuna's heartbeat timeout. The trial
then fails, and another process can claim the run.
"""

from __future__ import annotations

import math
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import Any

from ...errors import ConfigError, WeftError
from ..plan.sweep import RunSpec
from .processes import describe_process, has_ended, this_process
from .study_location import StudyLocation, database_errors

SCHEMA = 1
ATTEMPTS = 2  # a run that failed or was lost is tried once more
# Seconds between two heartbeats, and without any until a claim is lost.
HEARTBEAT, GRACE = 20, 120
MEASURE = "measure "


@dataclass(frozen=True)
class State:
    """`done`: results of runs that need no more work, by key. `busy`: keys of runs that a process
    has claimed. `retrying`: last failure of runs that get another attempt, by key.
    """

    done: dict[str, dict[str, Any]] = field(default_factory=dict)
    busy: frozenset[str] = frozenset()
    retrying: dict[str, dict[str, Any]] = field(default_factory=dict)


class Study:
    """The study of one comparison. A `with` block sends heartbeats for this process's claims, and
    gives up unfinished ones at its end.
    """

    def __init__(
        self, location: StudyLocation, *, heartbeat: int = HEARTBEAT, grace: int = GRACE
    ) -> None:
        """Connects, and creates the tables if they do not exist. Raises WeftError if that fails."""
        import optuna
        from sqlalchemy import create_engine

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.location, self._heartbeat = location, heartbeat
        self._claimed: dict[str, int] = {}
        self._owner, self._last_heartbeat = this_process(), time.time()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        url, keywords = location.engine_arguments()
        with database_errors(location):
            self._locks = create_engine(url, **keywords)  # locks occupy a connection
            # Locked: two processes cannot create the tables at the same time.
            with self.lock(), _experimental():
                try:
                    self._storage = optuna.storages.RDBStorage(
                        url,
                        engine_kwargs=keywords,
                        heartbeat_interval=heartbeat,
                        grace_period=grace,
                    )
                except RuntimeError as error:  # tables of another Optuna version
                    raise WeftError(
                        f"the study {location} cannot be used: {' '.join(str(error).split())}"
                    ) from None

    def __enter__(self) -> Study:
        self._thread = threading.Thread(target=self._keep_alive, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        try:
            if self._claimed:
                with suppress(WeftError):  # others then notice the missing heartbeat
                    self._release()
        finally:
            self.close()

    def close(self) -> None:
        """Closes the connections."""
        self._storage.remove_session()
        self._storage.engine.dispose()
        self._locks.dispose()

    def lock(self, *what: str) -> AbstractContextManager[None]:
        """Returns a lock that one process at a time can have, of all that share the study."""
        return self.location.lock(self._locks, *what)

    def match(self, identity: Mapping[str, Any]) -> bool:
        """Returns True if the study has a comparison. Raises ConfigError if it is another one."""
        from optuna import get_all_study_names, load_study

        with database_errors(self.location):
            if self.location.name not in get_all_study_names(self._storage):
                return False
            stored = load_study(
                study_name=self.location.name, storage=self._storage
            ).user_attrs.get("identity", {})
        for name, value in identity.items():
            if stored and stored.get(name) != value:
                other = "--out" if self.location.url is None else "name to --study (URL#NAME)"
                raise ConfigError(
                    f"{self.location} has a comparison with {name} {stored.get(name)!r}, and this "
                    f"one has {value!r}. Give another {other}."
                )
        return bool(stored)

    def count(self) -> int:
        """Returns the number of finished runs of any comparison."""
        from optuna import get_all_study_names, load_study

        with database_errors(self.location):
            if self.location.name not in get_all_study_names(self._storage):
                return 0
            trials = load_study(study_name=self.location.name, storage=self._storage).get_trials(
                deepcopy=False
            )
        return sum(result["status"] == "finished" for result in state_of(trials).done.values())

    def open(self, identity: Mapping[str, Any], direction: str = "maximize") -> None:
        """Creates the study, or checks that it has the same comparison.

        `direction` says whether the highest or the lowest value is best. Raises ConfigError if it
        is another comparison.
        """
        from optuna import create_study

        with database_errors(self.location), self.lock():
            there = self.match(identity)
            self._study = create_study(
                study_name=self.location.name,
                storage=self._storage,
                direction=direction,
                load_if_exists=True,
            )
            self._id = self._storage.get_study_id_from_name(self.location.name)
            if not there:
                self._study.set_user_attr("identity", {"schema": SCHEMA, **identity})

    def refresh(self) -> State:
        """Takes the claims of ended processes away, and returns the state of the runs."""
        from optuna.storages import fail_stale_trials
        from optuna.trial import TrialState

        with database_errors(self.location), self.lock():
            # After sleep, this machine would lose its own claims.
            if time.time() - self._last_heartbeat > 2 * self._heartbeat:
                self._send_heartbeats()
            for trial in self._trials():
                if trial.state == TrialState.RUNNING and has_ended(trial.user_attrs.get("by", {})):
                    self._storage.set_trial_state_values(self._id_of(trial), TrialState.FAIL)
            with _experimental():
                fail_stale_trials(self._study)
            return state_of(self._trials())

    def claim(self, spec: RunSpec, key: str) -> bool:
        """Returns True if the run now belongs to this process, False if another process has it or
        it needs no more work.
        """
        from optuna.trial import TrialState

        with database_errors(self.location), self.lock():
            trials = self._trials()
            state = state_of(trials)
            if key in state.done or key in state.busy:
                return False
            waiting = [
                t for t in trials if t.state == TrialState.WAITING and t.user_attrs["key"] == key
            ]
            trial = (
                self._id_of(waiting[0])
                if waiting
                else self._storage.create_new_trial(self._id, _queued_trial(spec, key, self._owner))
            )
            self._claimed[key] = trial
            # First the heartbeat: a running trial without any would never time out.
            self._storage.record_heartbeat(trial)
            self._storage.set_trial_state_values(trial, TrialState.RUNNING)
            if waiting:  # another process created it
                self._storage.set_trial_user_attr(trial, "by", self._owner)
            return True

    def finish(self, key: str, result: Mapping[str, Any]) -> bool:
        """Stores the result of a claimed run. Returns False if the claim was lost; then the result
        is not stored.
        """
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        trial, finished, kept = self._claimed[key], result["status"] == "finished", True
        score = result["validation"]["score"] if finished else math.nan
        with database_errors(self.location), self.lock():
            try:
                self._storage.set_trial_user_attr(trial, "result", dict(result))
                self._storage.set_trial_state_values(
                    trial,
                    TrialState.COMPLETE if finished else TrialState.FAIL,
                    [score] if math.isfinite(score) else None,
                )
            except UpdateFinishedTrialError:
                kept = False
        del self._claimed[key]  # last, so that Ctrl-C until here releases the claim
        return kept

    def retry(self) -> int:
        """Gives every failed run one more attempt. Returns their number."""
        with database_errors(self.location), self.lock():
            failed = {
                key: result
                for key, result in state_of(self._trials()).done.items()
                if result["status"] == "failed"
            }
            for key, result in failed.items():
                self._storage.create_new_trial(
                    self._id, _queued_trial(RunSpec(**result["spec"]), key, self._owner)
                )
        return len(failed)

    def measures(self) -> dict[str, dict[str, Any]]:
        """Returns step times and memory by key."""
        with database_errors(self.location):
            known = self._study.user_attrs
        return {
            name.removeprefix(MEASURE): value
            for name, value in known.items()
            if name.startswith(MEASURE)
        }

    def add_measure(self, key: str, result: Mapping[str, Any]) -> None:
        """Stores the step time and the memory of a row."""
        with database_errors(self.location), self.lock():
            self._study.set_user_attr(MEASURE + key, dict(result))

    def _trials(self) -> list[Any]:
        return list(self._study.get_trials(deepcopy=False))  # finished trials are cached

    def _id_of(self, trial: Any) -> int:
        return int(self._storage.get_trial_id_from_study_id_trial_number(self._id, trial.number))

    def _send_heartbeats(self) -> None:
        self._last_heartbeat = time.time()
        for trial in list(self._claimed.values()):
            self._storage.record_heartbeat(trial)

    def _keep_alive(self) -> None:
        while not self._stop.wait(self._heartbeat):
            # After an error the next heartbeat may arrive in time; finish() reports lost claims.
            with suppress(WeftError), database_errors(self.location):
                self._send_heartbeats()
        self._storage.remove_session()

    def _release(self) -> None:
        """Frees the claims that will not finish here. They do not count as attempts."""
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        with database_errors(self.location), self.lock():
            for trial in self._claimed.values():
                with suppress(UpdateFinishedTrialError):
                    self._storage.set_trial_user_attr(trial, "released", True)
                    self._storage.set_trial_state_values(trial, TrialState.FAIL)
        self._claimed.clear()


def _queued_trial(spec: RunSpec, key: str, by: Mapping[str, Any]) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
    from optuna.trial import TrialState, create_trial

    # Optuna needs one distribution per parameter and study; nothing is sampled from them.
    ranges = {
        "lr": FloatDistribution(sys.float_info.min, sys.float_info.max, log=True),
        "seed": IntDistribution(0, 2**31),
        "purpose": CategoricalDistribution(("tune", "final")),
    }
    return create_trial(
        state=TrialState.WAITING,
        distributions=ranges,
        params={"lr": spec.lr, "seed": spec.seed, "purpose": spec.purpose},
        user_attrs={"key": key, "label": spec.label, "spec": asdict(spec), "by": dict(by)},
    )


def state_of(trials: Sequence[Any]) -> State:
    """Returns the state of the runs from all trials in their order."""
    from optuna.trial import TrialState

    of: dict[str, list[Any]] = {}
    for trial in trials:
        of.setdefault(trial.user_attrs["key"], []).append(trial)
    done, busy, retrying = {}, set(), {}
    for key, attempts in of.items():
        states = {trial.state for trial in attempts}
        failed = [
            trial
            for trial in attempts
            if trial.state == TrialState.FAIL and not trial.user_attrs.get("released")
        ]
        reasons = [_failure(trial)["reason"] for trial in failed]
        complete = next((trial for trial in attempts if trial.state == TrialState.COMPLETE), None)
        if complete is not None:
            done[key] = {
                **complete.user_attrs["result"],
                "attempts": len(failed) + 1,
                "earlier": reasons,
            }
        elif TrialState.RUNNING in states:
            busy.add(key)
        elif failed and (len(failed) < ATTEMPTS or TrialState.WAITING in states):
            retrying[key] = _failure(failed[-1])
        elif failed:
            last = _failure(failed[-1])
            done[key] = {
                **last,
                "reason": f"{last['reason']} (tried {len(failed)} times)",
                "attempts": len(failed),
                "earlier": reasons[:-1],
            }
    return State(done, frozenset(busy), retrying)


def _failure(trial: Any) -> dict[str, Any]:
    lost = {
        "status": "failed",
        "lost": True,
        "spec": trial.user_attrs["spec"],
        "reason": f"the run was lost with {describe_process(trial.user_attrs['by'])}",
    }
    return {"spec": lost["spec"], **trial.user_attrs.get("result", lost)}


@contextmanager
def _experimental() -> Iterator[None]:
    """Silences Optuna's warning that the heartbeat interface may change: users cannot act on it."""
    from optuna.exceptions import ExperimentalWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        yield
