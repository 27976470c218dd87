"""Distributes jobs over worker processes, and replaces workers that die."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...errors import WeftError
from .pool import Pool, Worker

ATTEMPTS = 2  # a job whose worker dies is tried once more
POLL = 1.0  # seconds between two looks for new jobs: other processes finish some of them too


@dataclass(frozen=True)
class Job:
    """A message to a worker. `key` identifies the result; jobs with one key never run in parallel."""

    key: str
    message: Mapping[str, Any]


@dataclass
class JobSource:
    """Where a scheduler gets its jobs.

    `ready` returns the jobs that can start now, and `finished` receives their results. `claim`
    reserves a job that other processes share, and returns False if one of them was faster.
    `running_elsewhere` returns True while other processes have jobs of this source. `attempts` is
    how often a job is tried if its worker dies.
    """

    ready: Callable[[], Sequence[Job]]
    finished: Callable[[Job, dict[str, Any]], None]
    claim: Callable[[Job], bool] = lambda job: True
    running_elsewhere: Callable[[], bool] = lambda: False
    attempts: int = ATTEMPTS


@dataclass
class Scheduler:
    """Runs jobs on up to `size` workers, each of which opens `config` first."""

    pool: Pool
    config: Mapping[str, Any]
    size: int = 1
    description: dict[str, Any] = field(default_factory=dict)

    def start_first(self) -> dict[str, Any]:
        """Starts one worker and returns its description of model and task.

        Raises WeftError with the worker's reason if it cannot open them.
        """
        self.pool.add(self.config)
        while not self.description:
            self._opened(*self.pool.wait())
        return self.description

    def run(self, jobs: JobSource) -> None:
        """Runs jobs until none is left, here or elsewhere.

        The result of a job is the worker's answer, or {"status": "failed", "reason": ..., "lost":
        True} if there is none. Raises WeftError if no worker can be started.
        """
        deaths: Counter[str] = Counter()
        while True:
            ready = jobs.ready()
            wanted = min(self.size, len(ready) + len(self._running()))
            for _ in range(wanted - len(self.pool.workers)):
                self.pool.add(self.config)
            self._assign(ready, jobs)
            if not ready and not self._running() and not jobs.running_elsewhere():
                return
            received = self.pool.poll(POLL)
            if received is None:
                continue
            worker, message = received
            if worker.job == "open":
                self._opened(worker, message)
                continue
            job, worker.job = worker.job, None
            if "died" in message:
                self._replace(worker)
                if job is None:  # the worker was idle
                    continue
                deaths[job.key] += 1
                if deaths[job.key] < jobs.attempts:
                    continue
                tried = f" (tried {jobs.attempts} times)" if jobs.attempts > 1 else ""
                message = {"error": message["died"] + tried}
            jobs.finished(
                job, message["answer"] if "answer" in message else _lost(message["error"])
            )

    def keep_one_worker(self) -> None:
        """Stops all workers but one, so that nothing else takes time from a measurement."""
        self.size = 1
        idle = [number for number, worker in self.pool.workers.items() if worker.job is None]
        for number in [number for number in self.pool.workers if number not in idle[:1]]:
            self.pool.remove(number)

    def _assign(self, ready: Sequence[Job], jobs: JobSource) -> None:
        taken = self._running()
        idle = [worker for worker in self.pool.workers.values() if worker.job is None]
        for job in ready:
            if idle and job.key not in taken and jobs.claim(job):
                taken.add(job.key)
                worker = idle.pop(0)
                worker.job = job
                worker.send(job.message)

    def _running(self) -> set[str]:
        return {
            worker.job.key for worker in self.pool.workers.values() if isinstance(worker.job, Job)
        }

    def _replace(self, worker: Worker) -> None:
        self.pool.remove(worker.number)
        self.pool.add(self.config)

    def _opened(self, worker: Worker, message: Mapping[str, Any]) -> None:
        """Handles a worker's first answer. If it failed, the others continue without it.

        Raises WeftError if it was the only one, or if it sees another model or other data.
        """
        if "answer" in message:
            worker.job = None
            self.description = self.description or dict(message["answer"])
            if message["answer"]["context"] != self.description["context"]:
                raise WeftError(
                    "the model or the data changed while the comparison was running: "
                    f"{message['answer']['context']} is not {self.description['context']}."
                )
            return
        self.pool.remove(worker.number)
        self.size = max(1, len(self.pool.workers))
        if not self.pool.workers:
            reason = message.get("died") or message["error"]
            raise WeftError(
                reason
                if message.get("expected")
                else f"no worker process could be started: {reason}"
            )


def _lost(reason: str) -> dict[str, Any]:
    return {"status": "failed", "reason": reason, "lost": True}
