"""A run whose worker dies is tried once more, and then told as failed; a worker whose caller dies
ends at once.
"""

from __future__ import annotations

import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from weft import LoRA, methods
from weft.compare.plan.sweep import RunSpec
from weft.compare.run.pool import Pool
from weft.compare.run.scheduler import Job, JobSource, Scheduler
from weft.compare.run.trial_runner import RunnerConfig

CONFIG = asdict(
    RunnerConfig(
        task="digits",
        model="digits-vit",
        limits={"train": 20, "validation": 20, "test": 20},
        device="cpu",
    )
)


def _orphaned(pool: Pool) -> int:
    """Exit status of a worker whose caller goes away in the middle of a run that would take
    minutes.
    """
    worker, message = pool.wait()
    assert "answer" in message
    worker.send(job("long", 1e-2, steps=20_000).message)
    time.sleep(0.5)
    assert worker.process.stdin is not None
    worker.process.stdin.close()
    return worker.process.wait(timeout=30)


def job(key: str, lr: float, steps: int = 400) -> Job:
    config = methods.to_json(LoRA(r=2, modules_to_save=("classifier",)))
    return Job(
        key,
        {
            "do": "run",
            "save_to": None,
            "spec": asdict(RunSpec(key, config, lr, 1e-2, 0, steps, 10, "tune")),
        },
    )


class Killer(threading.Thread):
    """Kills every worker that holds the job of this key, once each."""

    def __init__(self, pool: Pool, key: str) -> None:
        super().__init__(daemon=True)
        self.pool, self.key, self.hit, self.stopped = pool, key, set[int](), False

    def run(self) -> None:
        while not self.stopped:
            for worker in list(self.pool.workers.values()):
                if (
                    isinstance(worker.job, Job)
                    and worker.job.key == self.key
                    and worker.number not in self.hit
                ):
                    self.hit.add(worker.number)
                    worker.process.kill()
            time.sleep(0.005)


def test_a_run_whose_worker_dies_is_tried_once_more_and_then_failed(tmp_path: Path) -> None:
    wanted = [job("is refused", -1.0), job("kills its worker", 1e-2)]
    results: dict[str, dict[str, Any]] = {}
    with Pool(tmp_path) as pool:
        scheduler = Scheduler(pool, CONFIG)
        scheduler.start_first()
        killer = Killer(pool, "kills its worker")
        killer.start()
        scheduler.run(
            JobSource(
                lambda: [o for o in wanted if o.key not in results],
                lambda o, r: results.update({o.key: r}),
            )
        )
        killer.stopped = True
        killer.join()
        orphan = _orphaned(pool)
        alive = [worker.process for worker in pool.workers.values()]
    assert killer.hit == {0, 1}
    assert results["kills its worker"]["status"] == "failed"
    assert results["kills its worker"]["lost"]
    assert "signal 9" in results["kills its worker"]["reason"]
    assert "tried 2 times" in results["kills its worker"]["reason"]
    assert "lr must be a number above 0" in results["is refused"]["reason"]
    assert orphan == 0
    assert alive
    assert all(
        process.poll() is not None for process in alive
    )  # leaving the pool ends every worker


def test_workers_are_spread_over_the_gpus_and_each_sees_one(tmp_path: Path) -> None:
    with Pool(tmp_path, ["3", "GPU-5f"]) as pool:
        workers = [pool.add(CONFIG) for _ in range(4)]
        seen = [
            psutil.Process(worker.process.pid).environ()["CUDA_VISIBLE_DEVICES"]
            for worker in workers
        ]
        assert seen == ["3", "GPU-5f", "3", "GPU-5f"]
        pool.remove(workers[0].number)
        assert pool.add(CONFIG).gpu == "3"  # in place of the one that is gone
