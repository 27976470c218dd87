"""The runs of a comparison as an Optuna study: one trial an attempt, with everything that the run
found.

A trial's parameters are the learning rate, the seed and the purpose; its value is the validation
score. Its user attributes are the run's key, its label, the process that has it, and the result.
Optuna draws nothing here: which runs there are is plan.py's business. What the study gives is that
they are kept, and that processes on one machine or many share them.

A process claims a run under a lock, so no two have it. A process that is gone loses its claims: on
this machine at once, elsewhere when Optuna's heartbeat has been silent for a while. The trial then
fails, and the run is free again.
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

from ..errors import ConfigError, WeftError
from .place import Place, reached
from .plan import RunSpec
from .processes import is_gone, me, told

SCHEMA = 1
ATTEMPTS = 2  # a run that failed or was lost is tried once more
BEAT, GRACE = 20, 120  # seconds between two heartbeats, and of silence after which a claim is lost
MEASURE = "measure "


@dataclass(frozen=True)
class State:
    """`done`: results of runs that need no more work, by key. `busy`: keys that some process has.
    `again`: failed once.
    """

    done: dict[str, dict[str, Any]] = field(default_factory=dict)
    busy: frozenset[str] = frozenset()
    again: dict[str, dict[str, Any]] = field(default_factory=dict)


class Study:
    """The study of one comparison. In a `with` block it keeps this process's claims alive, and
    gives them up at its end.
    """

    def __init__(self, place: Place, *, beat: int = BEAT, grace: int = GRACE) -> None:
        """Connects, and creates the tables where there are none. Raises WeftError where that does
        not work.
        """
        import optuna
        from sqlalchemy import create_engine

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.place, self._beat = place, beat
        self._mine: dict[str, int] = {}
        self._me, self._beaten = me(), time.time()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        url, keywords = place.engine_arguments()
        with reached(place):
            self._locks = create_engine(url, **keywords)  # of its own: a lock holds a connection
            with (
                self.lock(),
                _experimental(),
            ):  # two processes that create the tables at once would trip each other up
                try:
                    self._storage = optuna.storages.RDBStorage(
                        url, engine_kwargs=keywords, heartbeat_interval=beat, grace_period=grace
                    )
                except RuntimeError as error:  # the tables are another Optuna's
                    raise WeftError(
                        f"the study {place} cannot be used: {' '.join(str(error).split())}"
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
            if self._mine:
                with suppress(WeftError):  # then others learn it from the heartbeat
                    self._release()
        finally:
            self.close()

    def close(self) -> None:
        self._storage.remove_session()
        self._storage.engine.dispose()
        self._locks.dispose()

    def lock(self, *what: str) -> AbstractContextManager[None]:
        """Held by one process at a time, of all that share the study."""
        return self.place.lock(self._locks, *what)

    def match(self, identity: Mapping[str, Any]) -> bool:
        """Whether the comparison is there; raises ConfigError where another one is."""
        from optuna import get_all_study_names, load_study

        with reached(self.place):
            if self.place.name not in get_all_study_names(self._storage):
                return False
            before = load_study(study_name=self.place.name, storage=self._storage).user_attrs.get(
                "identity", {}
            )
        for name, value in identity.items():
            if before and before.get(name) != value:
                other = "--out" if self.place.url is None else "name to --study (URL#NAME)"
                raise ConfigError(
                    f"{self.place} holds a comparison with {name} {before.get(name)!r}, and this "
                    "one has "
                    f"{value!r}. Give another {other}."
                )
        return bool(before)

    def count(self) -> int:
        """Runs that have finished, of whatever comparison is there."""
        from optuna import get_all_study_names, load_study

        with reached(self.place):
            if self.place.name not in get_all_study_names(self._storage):
                return 0
            trials = load_study(study_name=self.place.name, storage=self._storage).get_trials(
                deepcopy=False
            )
        return sum(result["status"] == "finished" for result in state_of(trials).done.values())

    def open(self, identity: Mapping[str, Any], direction: str = "maximize") -> None:
        """Create the study, or check that it holds the same comparison. `direction`: of the value.
        Raises ConfigError.
        """
        from optuna import create_study

        with reached(self.place), self.lock():
            there = self.match(identity)
            self._study = create_study(
                study_name=self.place.name,
                storage=self._storage,
                direction=direction,
                load_if_exists=True,
            )
            self._id = self._storage.get_study_id_from_name(self.place.name)
            if not there:
                self._study.set_user_attr("identity", {"schema": SCHEMA, **identity})

    def refresh(self) -> State:
        """How the runs stand, after the claims of processes that are gone have been taken from
        them.
        """
        from optuna.storages import fail_stale_trials
        from optuna.trial import TrialState

        with reached(self.place), self.lock():
            if (
                time.time() - self._beaten > 2 * self._beat
            ):  # a machine that slept would take its own claims for silent
                self._record()
            for trial in self._trials():
                if trial.state == TrialState.RUNNING and is_gone(trial.user_attrs.get("by", {})):
                    self._storage.set_trial_state_values(self._id_of(trial), TrialState.FAIL)
            with _experimental():
                fail_stale_trials(self._study)
            return state_of(self._trials())

    def claim(self, spec: RunSpec, key: str) -> bool:
        """Whether the run is ours now. False: another process has it, or it needs no more work."""
        from optuna.trial import TrialState

        with reached(self.place), self.lock():
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
                else self._storage.create_new_trial(self._id, _waiting(spec, key, self._me))
            )
            self._mine[key] = trial
            self._storage.record_heartbeat(
                trial
            )  # before it runs: a claim without a heartbeat would never be silent
            self._storage.set_trial_state_values(trial, TrialState.RUNNING)
            if waiting:  # another made it
                self._storage.set_trial_user_attr(trial, "by", self._me)
            return True

    def finish(self, key: str, result: Mapping[str, Any]) -> bool:
        """Keep what our run found. False: the claim had been taken from us, and the result is not
        kept.
        """
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        trial, finished, kept = self._mine[key], result["status"] == "finished", True
        score = result["validation"]["score"] if finished else math.nan
        with reached(self.place), self.lock():
            try:
                self._storage.set_trial_user_attr(trial, "result", dict(result))
                self._storage.set_trial_state_values(
                    trial,
                    TrialState.COMPLETE if finished else TrialState.FAIL,
                    [score] if math.isfinite(score) else None,
                )
            except UpdateFinishedTrialError:
                kept = False
        del self._mine[key]  # not before: until then Ctrl-C gives the run back
        return kept

    def retry(self) -> int:
        """Free every run that failed for one more attempt; their number."""
        with reached(self.place), self.lock():
            failed = {
                key: result
                for key, result in state_of(self._trials()).done.items()
                if result["status"] == "failed"
            }
            for key, result in failed.items():
                self._storage.create_new_trial(
                    self._id, _waiting(RunSpec(**result["spec"]), key, self._me)
                )
        return len(failed)

    def measures(self) -> dict[str, dict[str, Any]]:
        """Step times and memory, by key."""
        with reached(self.place):
            known = self._study.user_attrs
        return {
            name.removeprefix(MEASURE): value
            for name, value in known.items()
            if name.startswith(MEASURE)
        }

    def add_measure(self, key: str, result: Mapping[str, Any]) -> None:
        with reached(self.place), self.lock():
            self._study.set_user_attr(MEASURE + key, dict(result))

    def _trials(self) -> list[Any]:
        return list(
            self._study.get_trials(deepcopy=False)
        )  # what has finished comes from Optuna's cache

    def _id_of(self, trial: Any) -> int:
        return int(self._storage.get_trial_id_from_study_id_trial_number(self._id, trial.number))

    def _record(self) -> None:
        self._beaten = time.time()
        for trial in list(self._mine.values()):
            self._storage.record_heartbeat(trial)

    def _keep_alive(self) -> None:
        while not self._stop.wait(self._beat):
            with (
                suppress(WeftError),
                reached(self.place),
            ):  # the next one makes up for it; finish() tells what was lost
                self._record()
        self._storage.remove_session()

    def _release(self) -> None:
        """What we have and will not finish is free at once, and it was no attempt."""
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        with reached(self.place), self.lock():
            for trial in self._mine.values():
                with suppress(UpdateFinishedTrialError):
                    self._storage.set_trial_user_attr(trial, "released", True)
                    self._storage.set_trial_state_values(trial, TrialState.FAIL)
        self._mine.clear()


def _waiting(spec: RunSpec, key: str, by: Mapping[str, Any]) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
    from optuna.trial import TrialState, create_trial

    # As wide as can be: within a study Optuna wants one kind of distribution a name, and we draw
    # from none.
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
    """How the runs stand, from all trials in their order."""
    from optuna.trial import TrialState

    of: dict[str, list[Any]] = {}
    for trial in trials:
        of.setdefault(trial.user_attrs["key"], []).append(trial)
    done, busy, again = {}, set(), {}
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
            again[key] = _failure(failed[-1])
        elif failed:
            last = _failure(failed[-1])
            done[key] = {
                **last,
                "reason": f"{last['reason']} (tried {len(failed)} times)",
                "attempts": len(failed),
                "earlier": reasons[:-1],
            }
    return State(done, frozenset(busy), again)


def _failure(trial: Any) -> dict[str, Any]:
    lost = {
        "status": "failed",
        "lost": True,
        "spec": trial.user_attrs["spec"],
        "reason": f"the run was lost with {told(trial.user_attrs['by'])}",
    }
    return {"spec": lost["spec"], **trial.user_attrs.get("result", lost)}


@contextmanager
def _experimental() -> Iterator[None]:
    """Optuna says of its heartbeat that the interface may change; a user can do nothing about
    that.
    """
    from optuna.exceptions import ExperimentalWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        yield
