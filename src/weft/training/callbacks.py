"""What happens around the steps: the audit, the log, the progress, saving whole checkpoints,
stopping early or on Ctrl-C.
"""

from __future__ import annotations

import json
import math
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from transformers import TrainerCallback

from ..errors import WeftError
from ..model.adapter import Adapter
from . import processes, resume
from .audit import Snapshot, audit, release, snapshot
from .config import EvalSection, RunConfig
from .loop import AUDIT_AFTER, DivergedError
from .losses import LOWER_IS_BETTER
from .run_dir import RunDir

LINES = 20  # of progress in a log file


class Audit(TrainerCallback):  # type: ignore[misc]
    """`weft.audit` over the first steps of a run; a run that goes on from within them is watched
    for as many again.
    """

    def __init__(self, adapter: Adapter, before: Snapshot, warm_up: int) -> None:
        self.adapter, self.before = adapter, before
        first = 1 if warm_up else 0  # in a warm-up the first step has rate 0
        self.after = max(AUDIT_AFTER, adapter.config.audit_after) + first
        self.at = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.at = state.global_step + self.after
        if (
            state.global_step
        ):  # later on, a method may hold a tensor still for good reasons: AdaLoRA's pruned triplets
            release(self.before)
            if state.global_step >= self.after or self.at > state.max_steps:
                self.at = 0
                return
            self.before = snapshot(self.adapter.model, self.adapter.name)
        elif self.at > state.max_steps:
            raise WeftError(
                f"train.steps={state.max_steps}: with this method and warm-up the audit needs "
                f"{self.after} "
                "steps to see every tensor move. Train for so many or more."
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.at:
            model, name = self.adapter.model, self.adapter.name
            audit(model, self.before, snapshot(model, name), name)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        release(self.before)


class Order(TrainerCallback):  # type: ignore[misc]
    """Tells the sampler the epoch, and asks for an evaluation behind the last step."""

    def __init__(self, per_epoch: int, evaluates: bool) -> None:
        self.per_epoch, self.evaluates = per_epoch, evaluates
        self.order: Any = None  # the trainer's sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.order is not None:
            self.order.set_epoch(state.global_step // self.per_epoch)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_evaluate, control.should_save = self.evaluates, True


class Log(TrainerCallback):  # type: ignore[misc]
    """One JSON line a logged step or evaluation, and the progress on a stream: a bar in a terminal,
    lines elsewhere.
    """

    def __init__(self, run: RunDir, stream: TextIO) -> None:
        self.run, self.stream = run, stream
        self.bar: Any = None
        self.began = self.told = time.monotonic()
        self.since, self.seen, self.first = time.monotonic(), 0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.first, self.seen = state.global_step, state.num_input_tokens_seen
        self.began = self.since = time.monotonic()
        if state.is_world_process_zero and self.stream.isatty():
            from tqdm import tqdm

            self.bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                file=self.stream,
                dynamic_ncols=True,
                leave=False,
                bar_format="{n_fmt}/{total_fmt} |{bar:16}| {remaining} left  {desc}",
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.update(1)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Any = None, optimizer: Any = None, **_: Any
    ) -> None:
        if "loss" in logs and not math.isfinite(logs["loss"]):
            raise DivergedError(
                f"the loss became {logs['loss']} at step {state.global_step}; the last checkpoint "
                "is from "
                "before. Lower optim.lr, or raise optim.warm_up."
            )
        if not state.is_world_process_zero or "train_loss" in logs:  # of the whole run
            return
        row = {"step": state.global_step, "epoch": round(state.epoch or 0.0, 4)}
        if "loss" in logs:
            row |= self._step(state, logs, optimizer)
        else:
            row |= {
                key.removeprefix("eval_"): value
                for key, value in logs.items()
                if key.startswith("eval_")
                and not key.endswith(("runtime", "per_second", "preparation_time"))
            }
            row["kind"] = "eval"
            self.since = time.monotonic()  # evaluation is no training time
        self.run.log(row)
        self._tell(state, row)

    def _step(self, state: Any, logs: Any, optimizer: Any) -> dict[str, Any]:
        now, tokens = time.monotonic(), state.num_input_tokens_seen
        rate = (tokens - self.seen) / max(now - self.since, 1e-9)
        self.since, self.seen = now, tokens
        counted = (
            {"tokens": tokens, "tokens_per_second": round(rate, 1)} if tokens else {}
        )  # images have none
        return {
            "kind": "train",
            "loss": logs["loss"],
            "lr": logs["learning_rate"],
            **_rates(logs["learning_rate"], optimizer),
            "grad_norm": logs.get("grad_norm"),
            **counted,
            "memory_bytes": memory(),
        }

    def _tell(self, state: Any, row: dict[str, Any]) -> None:
        text = told(row)
        if self.bar is not None:
            if row["kind"] == "eval":
                self.bar.write(f"step {row['step']}: {text}", file=self.stream)
            else:
                self.bar.set_description_str(text)
        elif (
            row["kind"] == "eval"
            or row["step"] % max(1, state.max_steps // LINES) == 0
            or row["step"] == state.max_steps
        ):
            done, left = row["step"] - self.first, state.max_steps - row["step"]
            rest = (
                f"  ({clock((time.monotonic() - self.began) / done * left)} left)"
                if done and left
                else ""
            )
            print(
                f"step {row['step']}/{state.max_steps}  {text}{rest}", file=self.stream, flush=True
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class Keep(TrainerCallback):  # type: ignore[misc]
    """Marks checkpoints as whole, keeps the best adapter, and stops where nothing gets better."""

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
                "that are all equal, or a "
                "program that its metric needs is missing), so this is not the best.",
                file=self.stream,
                flush=True,
            )
        elif best_place(values) == len(values) - 1 and state.is_world_process_zero:
            self.adapter.save(self.run.best)
        if section.patience is not None and stale(values, section.min_delta) >= section.patience:
            control.should_training_stop = control.should_save = True


class Stop(TrainerCallback):  # type: ignore[misc]
    """Ctrl-C (or SIGTERM) ends the step or the evaluation under way, saves, and stops; a second one
    stops at once.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.asked, self.evaluating = stream, False, False
        self.before: dict[int, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            self.before = {
                number: signal.signal(number, self._ask)
                for number in (signal.SIGINT, signal.SIGTERM)
            }

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked:
            self.restore()
            raise KeyboardInterrupt
        self.asked = True
        what = "evaluation" if self.evaluating else "step"
        print(
            f"\nStopping after this {what}, with a checkpoint. Ctrl-C again stops at once.",
            file=self.stream,
            flush=True,
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.evaluating = control.should_evaluate  # Order has spoken
        self._stop(args, control)

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.evaluating = False
        self._stop(args, control)

    def _stop(self, args: Any, control: Any) -> None:
        if args.world_size > 1:
            self.asked = processes.any_of(self.asked, args.device)
        if self.asked:
            control.should_save = control.should_training_stop = True

    def restore(self) -> None:
        """The handlers that were there before."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}


def _rates(first: float, optimizer: Any) -> dict[str, Any]:
    """The rate of every group by name, where there is more than one; all follow one schedule."""
    groups = optimizer.param_groups if optimizer is not None else []
    found = {
        group["name"]: first * group["initial_lr"] / groups[0]["initial_lr"] for group in groups
    }
    return {"lrs": found} if len(found) > 1 else {}


def scores(
    history: Sequence[Mapping[str, Any]], section: EvalSection, prefix: str = "eval_"
) -> list[float]:
    """The chosen metric of every evaluation, turned so that more is better; one that has no value
    (a correlation with predictions that are all equal) is worse than all that have one. An
    evaluation always has its loss.
    """
    sign = -1.0 if section.best in LOWER_IS_BETTER else 1.0
    values = [entry.get(f"{prefix}{section.best}") for entry in history if f"{prefix}loss" in entry]
    return [-math.inf if value is None or math.isnan(value) else sign * value for value in values]


def has_ended(folder: Path, config: RunConfig, steps: int) -> bool:
    """Training came to its end with this checkpoint, by its steps or by eval.patience; only the
    result was not written.
    """
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    section = config.eval
    stopped = (
        section.patience is not None
        and stale(scores(state["log_history"], section), section.min_delta) >= section.patience
    )
    return bool(state["global_step"] >= steps or stopped)


def best_place(values: list[float]) -> int:
    """Of the first of the best."""
    return max(range(len(values)), key=values.__getitem__)


def stale(values: list[float], min_delta: float) -> int:
    """Evaluations since the last that was better by more than min_delta than all that count before
    it.
    """
    best, since = -math.inf, 0
    for value in values:
        best, since = (value, 0) if value > best + min_delta else (best, since + 1)
    return since


def told(row: dict[str, Any]) -> str:
    """A row of the log in words."""
    if row["kind"] == "train":
        speed = f"  {row['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in row else ""
        return f"loss {row['loss']:.4f}  lr {row['lr']:.2e}{speed}"
    return "eval  " + "  ".join(
        f"{key} {value:.4f}"
        for key, value in row.items()
        if key not in ("step", "epoch", "kind") and isinstance(value, float)
    )


def memory() -> int:
    """Most bytes held so far: by torch on CUDA, by the process elsewhere."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) * (1 if sys.platform == "darwin" else 1024)


def clock(seconds: float) -> str:
    """1:05, or 1:02:03 from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
