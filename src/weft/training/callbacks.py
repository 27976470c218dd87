"""The Trainer's callbacks: the audit, evaluation at the end, whole checkpoints, and stopping early
or on Ctrl-C. The log is in log.py.
"""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable
from typing import Any, TextIO

import torch
from transformers import TrainerCallback

from ..auditing.audit import audit, steps_until_audit
from ..auditing.snapshot import Snapshot, snapshot
from ..errors import WeftError
from ..model.adapter import Adapter
from . import processes, resume, terminal
from .best import best_index, scores, stale
from .config.sections import RunConfig
from .run_dir import RunDir
from .sampling import EpochOrder


class Audit(TrainerCallback):  # type: ignore[misc]
    """Runs `weft.audit` over the first steps. A run resumed within these steps is audited again
    for the same number of steps.
    """

    def __init__(
        self,
        adapter: Adapter,
        before: Snapshot,
        warm_up: int,
        unreached: str,
        report: Callable[[list[str], int], None],
    ) -> None:
        self.adapter, self.before = adapter, before
        # Modules that gradients hardly reached are allowed with "allow", and `report` is told of them.
        self.unreached, self.report = unreached, report
        # In a warm-up the first step has rate 0.
        self.steps = steps_until_audit(adapter) + (1 if warm_up else 0)
        self.last = 0  # the step after which the audit runs; 0: no audit

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Chooses the step of the audit. Raises WeftError if the run has fewer steps than it needs."""
        self.last = state.global_step + self.steps
        if state.global_step:
            # Later on a method may rightly keep a tensor unchanged: AdaLoRA's pruned triplets.
            self.before.release()
            if state.global_step >= self.steps or self.last > state.max_steps:
                self.last = 0
                return
            self.before = snapshot(self.adapter.model, self.adapter.name)
        elif self.last > state.max_steps:
            raise WeftError(
                f"train.steps={state.max_steps}: with this method and warm-up the audit needs "
                f"{self.steps} steps to see every tensor move. Train for at least that many."
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.last:
            model, name = self.adapter.model, self.adapter.name
            left = audit(model, self.before, snapshot(model, name), name, self.unreached)
            if left and state.is_world_process_zero:
                self.report(left, self.steps)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.before.release()


class Epochs(TrainerCallback):  # type: ignore[misc]
    """Sets the sampler's epoch, and requests an evaluation and a checkpoint after the last step."""

    def __init__(self, order: EpochOrder, per_epoch: int, evaluates: bool) -> None:
        self.order, self.per_epoch, self.evaluates = order, per_epoch, evaluates

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.order.set_epoch(state.global_step // self.per_epoch)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_evaluate, control.should_save = self.evaluates, True


class Checkpoints(TrainerCallback):  # type: ignore[misc]
    """Marks checkpoints as whole, keeps the best adapter, and stops if nothing gets better."""

    def __init__(self, adapter: Adapter, config: RunConfig, run: RunDir, stream: TextIO) -> None:
        self.adapter, self.config, self.run, self.stream = adapter, config, run, stream

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if args.world_size > 1:
            torch.distributed.barrier()  # every process has written its generators
        if state.is_world_process_zero:
            resume.complete(self.run.checkpoints / f"checkpoint-{state.global_step}")
            resume.prune(self.run.checkpoints, self.config.save.keep)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any
    ) -> None:
        section = self.config.eval
        if section.best is None:
            return
        values = scores(state.log_history, section)
        if not math.isfinite(values[-1]) and state.is_world_process_zero:
            print(
                f"eval.best={section.best} has no value at step {state.global_step} (predictions "
                "that are all equal, or a program that its metric needs is missing), so this is "
                "not the best.",
                file=self.stream,
                flush=True,
            )
        elif best_index(values) == len(values) - 1 and state.is_world_process_zero:
            self.adapter.save(self.run.best)
        if section.patience is not None and stale(values, section.min_delta) >= section.patience:
            control.should_training_stop = control.should_save = True


class Stop(TrainerCallback):  # type: ignore[misc]
    """On Ctrl-C, SIGTERM or SIGHUP finishes the current step or evaluation, saves, and stops. A
    second signal stops at once, except a SIGHUP: a terminal that closes may send several.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.requested, self.evaluating = stream, False, False
        self.previous: dict[int, Any] = {}
        self.terminals: list[int] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            self.terminals = terminal.open_terminals()
            self.previous = {
                number: signal.signal(number, self._request_stop) for number in terminal.signals()
            }

    def _request_stop(self, number: int, frame: Any) -> None:
        if number == getattr(signal, "SIGHUP", None):
            terminal.leave(self.terminals)
            if self.requested:
                return
        if self.requested:
            self.restore()
            raise KeyboardInterrupt
        self.requested = True
        what = "evaluation" if self.evaluating else "step"
        print(
            f"\nStopping after this {what}, with a checkpoint. Ctrl-C again stops at once.",
            file=self.stream,
            flush=True,
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.evaluating = control.should_evaluate  # as the Epochs callback decided
        self._stop(args, control)

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.evaluating = False
        self._stop(args, control)

    def _stop(self, args: Any, control: Any) -> None:
        if args.world_size > 1:
            self.requested = processes.any_of(self.requested, args.device)
        if self.requested:
            control.should_save = control.should_training_stop = True

    def restore(self) -> None:
        """Restores the previous signal handlers."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous = {}
