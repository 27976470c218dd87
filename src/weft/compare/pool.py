"""The caller's side of the worker processes."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import weft

from ..errors import WeftError


class WorkerDied(WeftError):
    """A worker process ended without an answer."""


class Worker:
    """One process; at most one order at a time. Its answers arrive in the pool's queue."""

    def __init__(
        self,
        number: int,
        log: Path,
        arrived: queue.Queue[tuple[int, dict[str, Any]]],
        gpu: str | None,
    ) -> None:
        self.number, self.gpu = number, gpu
        self.job: Any = None
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        # numpy's and torch's own thread pools would fight over the cores; bench.py raises torch's
        # where it pays
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONUNBUFFERED": "1",
        }
        if gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        root = str(Path(weft.__file__).resolve().parent.parent)
        environment["PYTHONPATH"] = os.pathsep.join(
            filter(None, (root, os.environ.get("PYTHONPATH")))
        )
        with log.open("wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "weft.compare.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                start_new_session=True,
                text=True,
                encoding="utf-8",
            )
        self._listener = threading.Thread(target=self._listen, args=(arrived,), daemon=True)
        self._listener.start()

    def _listen(self, arrived: queue.Queue[tuple[int, dict[str, Any]]]) -> None:
        if self.process.stdout is not None:
            for line in self.process.stdout:
                if line.endswith(
                    "\n"
                ):  # a worker that is killed while it answers leaves half a line
                    arrived.put((self.number, json.loads(line)))
        code = self.process.wait()
        how = f"signal {-code}" if code < 0 else f"exit status {code}"
        arrived.put((self.number, {"died": f"the worker process ended with {how}; see {self.log}"}))

    def send(self, order: Mapping[str, Any]) -> None:
        if self.process.stdin is None:
            return
        try:
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # its death is on its way through the queue

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self._listener.join()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):  # an order that it had not read
                    pipe.close()


class Pool:
    """Workers by number, and the queue in which their answers arrive. Stops them all on leaving."""

    def __init__(self, logs: Path, gpus: Sequence[str] = ()) -> None:
        """`gpus`: as CUDA_VISIBLE_DEVICES writes them; each worker sees one of them, or with none
        what we see.
        """
        self.logs, self.gpus = logs, gpus
        self.workers: dict[int, Worker] = {}
        self._arrived: queue.Queue[tuple[int, dict[str, Any]]] = queue.Queue()
        self._next = 0

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *error: object) -> None:
        for number in list(self.workers):
            self.remove(number)

    def add(self, opening: Mapping[str, Any]) -> Worker:
        """Start a worker and tell it to open its bench; the answer arrives like any other."""
        busy = [worker.gpu for worker in self.workers.values()]
        gpu = min(self.gpus, key=busy.count) if self.gpus else None
        worker = Worker(self._next, self.logs / f"worker-{self._next}.txt", self._arrived, gpu)
        self._next += 1
        self.workers[worker.number] = worker
        worker.job = "open"
        worker.send({"do": "open", "opening": opening})
        return worker

    def remove(self, number: int) -> None:
        self.workers.pop(number).stop()

    def wait(self) -> tuple[Worker, dict[str, Any]]:
        """The next answer of a worker that is still in the pool. Ctrl-C gets through."""
        while True:
            arrived = self.poll(0.2)
            if arrived is not None:
                return arrived

    def poll(self, seconds: float) -> tuple[Worker, dict[str, Any]] | None:
        """The same, or None where none arrives in this time."""
        with contextlib.suppress(queue.Empty):
            number, message = self._arrived.get(timeout=seconds)
            if number in self.workers:
                return self.workers[number], message
        return None
