"""Worker processes as their caller sees them."""

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

Answers = queue.Queue[tuple[int, dict[str, Any]]]  # number of the worker, its message


class Worker:
    """One process with at most one job at a time. Its answers arrive in the pool's queue."""

    def __init__(self, number: int, log: Path, answers: Answers, gpu: str | None) -> None:
        self.number, self.gpu, self.log = number, gpu, log
        self.job: Any = None
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "weft.compare.run.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=_environment(gpu),
                start_new_session=True,
                text=True,
                encoding="utf-8",
            )
        self._listener = threading.Thread(target=self._listen, args=(answers,), daemon=True)
        self._listener.start()

    def _listen(self, answers: Answers) -> None:
        if self.process.stdout is not None:
            for line in self.process.stdout:
                if line.endswith("\n"):  # a worker killed during its answer leaves half a line
                    answers.put((self.number, json.loads(line)))
        code = self.process.wait()
        how = f"signal {-code}" if code < 0 else f"exit status {code}"
        answers.put((self.number, {"died": f"the worker process ended with {how}; see {self.log}"}))

    def send(self, message: Mapping[str, Any]) -> None:
        """Sends one JSON line. If the worker is dead, its end arrives in the queue."""
        if self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.write(json.dumps(message) + "\n")
                self.process.stdin.flush()

    def stop(self) -> None:
        """Kills the process and closes its pipes."""
        self.process.kill()
        self.process.wait()
        self._listener.join()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):  # a job that it had not read
                    pipe.close()


def _environment(gpu: str | None) -> dict[str, str]:
    """One thread: the thread pools of numpy and torch would compete for the cores.

    trial_runner.py raises torch's number of threads for large models.
    """
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
    path = filter(None, (root, os.environ.get("PYTHONPATH")))
    return {**environment, "PYTHONPATH": os.pathsep.join(path)}


class Pool:
    """Workers by number, and the queue of their answers. Leaving the `with` block stops them."""

    def __init__(self, logs: Path, gpus: Sequence[str] = ()) -> None:
        """`gpus` are names as in CUDA_VISIBLE_DEVICES. Each worker sees one of them.

        Without `gpus`, workers see the GPUs of this process.
        """
        self.logs, self.gpus = logs, gpus
        self.workers: dict[int, Worker] = {}
        self._answers: Answers = queue.Queue()
        self._next = 0

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *error: object) -> None:
        for number in list(self.workers):
            self.remove(number)

    def add(self, config: Mapping[str, Any]) -> Worker:
        """Starts a worker and tells it to open `config`; its answer arrives like any other."""
        in_use = [worker.gpu for worker in self.workers.values()]
        gpu = min(self.gpus, key=in_use.count) if self.gpus else None
        worker = Worker(self._next, self.logs / f"worker-{self._next}.txt", self._answers, gpu)
        self._next += 1
        self.workers[worker.number] = worker
        worker.job = "open"
        worker.send({"do": "open", "config": config})
        return worker

    def remove(self, number: int) -> None:
        """Stops a worker and forgets it."""
        self.workers.pop(number).stop()

    def wait(self) -> tuple[Worker, dict[str, Any]]:
        """Returns the next answer of a worker in the pool. Ctrl-C interrupts the wait."""
        while True:
            received = self.poll(0.2)
            if received is not None:
                return received

    def poll(self, seconds: float) -> tuple[Worker, dict[str, Any]] | None:
        """Returns the next answer, or None if none arrives within this time."""
        with contextlib.suppress(queue.Empty):
            number, message = self._answers.get(timeout=seconds)
            if number in self.workers:
                return self.workers[number], message
        return None
