"""The end of a run: the adapter that is the result and its files, or the reason for a failure."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from ..checkpoint.load import read
from ..errors import WeftError
from ..model.adapter import Adapter
from . import card, curves, processes
from .best import best_index, scores
from .config.sections import RunConfig
from .prepare import Data
from .resume import newest, refill
from .run_dir import RunDir


def choose(
    config: RunConfig, run: RunDir, adapter: Adapter, stream: TextIO
) -> dict[str, Any] | None:
    """Returns the log's row of the evaluation whose adapter is the result. If that is not the last
    one, its tensors are put back into the adapter.
    """
    rows = [row for row in run.rows() if row["kind"] == "eval"]
    if not rows:
        return None
    if config.eval.best is None:
        return rows[-1]
    values = scores(rows, config.eval, prefix="")
    index = best_index(values)
    if not math.isfinite(values[index]):
        print(
            f"eval.best={config.eval.best} had no value at any evaluation; the last adapter is "
            "kept.",
            file=stream,
        )
        return rows[-1]
    if index != len(rows) - 1:
        refill(adapter, run.best)
    return rows[index]


def write_result(
    config: RunConfig,
    run: RunDir,
    adapter: Adapter,
    data: Data,
    step: int,
    chosen: dict[str, Any] | None,
) -> None:
    """Writes the adapter with its tokenizer, the result into run.json, the model card and the
    curves.
    """
    adapter.save(run.adapter)
    if data.files is not None:
        data.files.save_pretrained(run.adapter)
    rows = run.rows()
    losses = [row["loss"] for row in rows if row["kind"] == "train"]
    run.finish(
        status="finished",
        steps_done=step,
        evaluation=chosen,
        last_loss=losses[-1] if losses else None,
    )
    record, in_peft_format = run.read(), read(run.adapter).peft_reads_it
    run.put("README.md", card.card(record, "adapter", in_peft_format))
    RunDir(run.adapter).put("README.md", card.card(record, ".", in_peft_format))
    title = f"{type(config.method).__name__} on {config.model.path}"
    curves.draw(rows, run.root / "curves.png", title)


@contextmanager
def failures_recorded(run: RunDir, stream: TextIO) -> Iterator[None]:
    """Records in run.json the failure that ends a run early, and reports which checkpoint is left.

    Raises WeftError if the disk refused a write.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        found = newest(run.checkpoints)
        left = (
            f"the newest whole checkpoint is of step {found[1]}"
            if found
            else "there is no whole checkpoint yet"
        )
        if processes.first():
            with suppress(OSError, WeftError):  # the disk may be the reason
                if isinstance(error, KeyboardInterrupt):
                    run.finish(status="interrupted", steps_done=found[1] if found else 0)
                else:
                    run.finish(status="failed", reason=f"{type(error).__name__}: {error}")
        if isinstance(error, KeyboardInterrupt):
            print(
                f"Stopped at once; {left}, and --resume continues from there.",
                file=stream,
                flush=True,
            )
        if isinstance(error, OSError):
            raise WeftError(
                f"{run.root} could not be written to ({error}); {left}. Free some space, and "
                "continue with --resume."
            ) from error
        raise
