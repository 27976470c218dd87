"""The training loop of a run: the Trainer with Weft's callbacks, from the first or the resumed step
to the last.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TextIO

from ..auditing.snapshot import Snapshot
from ..model.adapter import Adapter
from .best import has_ended
from .callbacks import Audit, Checkpoints, Epochs, Stop
from .config.sections import RunConfig
from .log import Log
from .prepare import Data, Length
from .reports import Report
from .resume import read_state
from .run_dir import RunDir
from .sampling import EpochOrder, GroupedOrder
from .trainer import AdapterTrainer, arguments, recompute_activations


class Loop:
    """Trains the adapter. `interrupted` is True if Ctrl-C stopped it before the last step."""

    def __init__(
        self,
        config: RunConfig,
        run: RunDir,
        data: Data,
        adapter: Adapter,
        before: Snapshot,
        length: Length,
        stream: TextIO,
    ) -> None:
        self.config, self.adapter, self.length = config, adapter, length
        args = arguments(config, run.checkpoints, length, data)
        if config.train.gradient_checkpointing:
            recompute_activations(adapter.model)
        order = _order(data, config, args.seed)
        self.log, self.stop, self.report = Log(run, stream), Stop(stream), Report(config)
        callbacks = [
            Audit(
                adapter,
                before,
                int(args.warmup_steps),
                config.audit.unreached,
                partial(run.report_unreached, stream),
            ),
            Epochs(order, length.per_epoch, data.eval is not None),
            self.log,
            Checkpoints(adapter, config, run, stream),
            self.stop,
            self.report,
        ]
        with _tensorboard_folder(run.root / "tensorboard"):
            self.trainer = AdapterTrainer(config, data, adapter, args, order, callbacks)

    @property
    def interrupted(self) -> bool:
        """Whether it was stopped before its last step."""
        return self.stop.requested and self.trainer.state.global_step < self.length.steps

    def run(self, checkpoint: tuple[Path, int] | None) -> int:
        """Trains from the first step, or from a checkpoint and its step, and returns the last step.

        Raises AuditError, DivergedError, and OSError if the disk is full.
        """
        ended = False
        try:
            if checkpoint and has_ended(checkpoint[0], self.config, self.length.steps):
                # It was killed while it wrote its result.
                read_state(self.adapter, checkpoint[0])
                self.trainer.state.global_step = checkpoint[1]
            else:
                self.trainer.train(
                    resume_from_checkpoint=str(checkpoint[0]) if checkpoint else None
                )
            ended = True
        finally:
            self.stop.restore()
            self.log.close()
            self.report.close(failed=not ended)
        # Restores the model's own forward.
        self.trainer.accelerator.unwrap_model(self.adapter.model, keep_fp32_wrapper=False)
        return int(self.trainer.state.global_step)


def _order(data: Data, config: RunConfig, seed: int) -> EpochOrder:
    """Samples with images are grouped, since a batch is as long as its longest row."""
    if data.kind != "image-text":
        return EpochOrder(len(data.train), seed)
    rows = [data.train[i] for i in range(len(data.train))]
    lengths = [len(row["input_ids"]) for row in rows]
    return GroupedOrder(lengths, ["images" in row for row in rows], config.train.batch, seed)


@contextmanager
def _tensorboard_folder(folder: Path) -> Iterator[None]:
    """The Trainer's reporter takes its folder from this variable alone. A value set by the user has
    precedence.
    """
    name = "TENSORBOARD_LOGGING_DIR"
    before = os.environ.get(name)
    os.environ[name] = before or str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
