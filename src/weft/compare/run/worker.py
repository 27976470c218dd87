"""A worker process of `weft compare`: opens model and task, then answers one JSON line per job.

A plain subprocess instead of multiprocessing: nothing is pickled, the caller's main module does not
matter, Ctrl-C in the terminal does not reach the worker, and it exits by itself if its caller is
gone, even if that was killed.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import traceback
from pathlib import Path
from typing import Any, TextIO

from ...errors import WeftError


def main() -> None:
    """Answers jobs until standard input ends."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # output of libraries goes to the log, not between the replies
    jobs: queue.Queue[dict[str, Any]] = queue.Queue()
    threading.Thread(target=_receive_jobs, args=(sys.stdin, jobs), daemon=True).start()
    runner: Any = None
    while True:
        job = jobs.get()
        try:
            if job["do"] == "open":
                from .trial_runner import RunnerConfig, open_runner

                runner = open_runner(RunnerConfig(**job["config"]))
                answer = runner.describe()
            else:
                answer = _answer(runner, job)
            _reply(replies, {"answer": answer})
        except WeftError as error:
            _reply(replies, {"error": str(error), "expected": True})
        except Exception as error:  # any other error fails this job only; its traceback is logged
            traceback.print_exc()
            _reply(
                replies,
                {
                    "error": f"{type(error).__name__}: {' '.join(str(error).split())}",
                    "expected": False,
                },
            )


def _receive_jobs(lines: TextIO, jobs: queue.Queue[dict[str, Any]]) -> None:
    for line in lines:
        jobs.put(json.loads(line))
    os._exit(0)  # the caller is gone: nobody would read the result of the current run


def _answer(runner: Any, job: dict[str, Any]) -> dict[str, Any]:
    from ..plan.sweep import RunSpec

    if job["do"] == "run":
        save_to = Path(job["save_to"]) if job["save_to"] else None
        return dict(runner.run(RunSpec(**job["spec"]), save_to))
    if job["do"] == "measure":
        return dict(runner.measure(job["config"], job["batch"]))
    if job["do"] == "ranks":
        return dict(runner.ranks(job["configs"], job["target"], job["limit"]))
    raise WeftError(f"a worker does not know the job {job['do']!r}.")


def _reply(replies: TextIO, message: dict[str, Any]) -> None:
    replies.write(json.dumps(message) + "\n")
    replies.flush()


if __name__ == "__main__":
    main()
