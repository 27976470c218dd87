"""Keeps the workers of a pool busy, and decides what becomes of an order whose worker dies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import WeftError
from .pool import Pool, Worker

ATTEMPTS = 2  # an order whose worker dies is tried once more
POLL = (
    1.0  # seconds after which it is asked anew what there is to do, since others may work on it too
)


@dataclass(frozen=True)
class Order:
    """What a worker is told to do; `key` names the result, and no two orders of one key run at a
    time.
    """

    key: str
    message: Mapping[str, Any]


@dataclass
class Jobs:
    """What a crew works on. `orders` gives those that may start now; `finished` gets their results.

    `take` claims an order from others who have the same ones, False where they were faster, and
    `elsewhere` says whether they still have some. `attempts`: how often a crew hands out an order
    whose worker dies before that is its result.
    """

    orders: Callable[[], Sequence[Order]]
    finished: Callable[[Order, dict[str, Any]], None]
    take: Callable[[Order], bool] = lambda order: True
    elsewhere: Callable[[], bool] = lambda: False
    attempts: int = ATTEMPTS


@dataclass
class Crew:
    """The workers of one comparison. `opening` is what every worker opens; `size` is how many there
    should be.
    """

    pool: Pool
    opening: Mapping[str, Any]
    size: int = 1
    description: dict[str, Any] = field(default_factory=dict)

    def open_first(self) -> dict[str, Any]:
        """Start one worker and return what it found. Raises WeftError with the reason why it could
        not open.
        """
        self.pool.add(self.opening)
        while not self.description:
            self._opened(*self.pool.wait())
        return self.description

    def work(self, jobs: Jobs) -> None:
        """Hand out orders until there are none, here or elsewhere; every result makes its order go
        away.

        A result is what the worker answered, or {"status": "failed", "reason": ..., "lost": True}
        where there is no answer.
        """
        deaths: Counter[str] = Counter()
        while True:
            waiting = jobs.orders()
            for _ in range(
                min(self.size, len(waiting) + len(self._running())) - len(self.pool.workers)
            ):
                self.pool.add(self.opening)
            self._hand_out(waiting, jobs)
            if not waiting and not self._running() and not jobs.elsewhere():
                return
            arrived = self.pool.poll(POLL)
            if arrived is None:
                continue
            worker, message = arrived
            if worker.job == "open":
                self._opened(worker, message)
                continue
            order, worker.job = worker.job, None
            if "died" in message:
                self._replace(worker)
                if order is None:  # it was waiting for work
                    continue
                deaths[order.key] += 1
                if deaths[order.key] < jobs.attempts:
                    continue
                tried = f" (tried {jobs.attempts} times)" if jobs.attempts > 1 else ""
                message = {"error": message["died"] + tried}
            jobs.finished(
                order, message["answer"] if "answer" in message else _lost(message["error"])
            )

    def shrink(self) -> None:
        """One worker stays, and no other process of ours takes time from it."""
        self.size = 1
        ready = [number for number, worker in self.pool.workers.items() if worker.job is None]
        for number in [number for number in self.pool.workers if number not in ready[:1]]:
            self.pool.remove(number)

    def _hand_out(self, waiting: Sequence[Order], jobs: Jobs) -> None:
        taken = self._running()
        free = [worker for worker in self.pool.workers.values() if worker.job is None]
        for order in waiting:
            if free and order.key not in taken and jobs.take(order):
                taken.add(order.key)
                worker = free.pop(0)
                worker.job = order
                worker.send(order.message)

    def _running(self) -> set[str]:
        return {
            worker.job.key for worker in self.pool.workers.values() if isinstance(worker.job, Order)
        }

    def _replace(self, worker: Worker) -> None:
        self.pool.remove(worker.number)
        self.pool.add(self.opening)

    def _opened(self, worker: Worker, message: Mapping[str, Any]) -> None:
        """A worker is ready, or cannot be: then the others go on without it, if there are
        others.
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
