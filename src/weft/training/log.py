"""The log and the progress of a run."""

from __future__ import annotations

import math
import sys
import time
from typing import Any, TextIO

import torch
from transformers import TrainerCallback

from .losses import DivergedError
from .run_dir import RunDir

LINES = 20  # of progress, if the output is not a terminal


class Log(TrainerCallback):  # type: ignore[misc]
    """Writes one JSON line per logged step or evaluation, and the progress to a stream: a bar in a
    terminal, lines elsewhere.
    """

    def __init__(self, run: RunDir, stream: TextIO) -> None:
        self.run, self.stream = run, stream
        self.bar: Any = None
        self.began = time.monotonic()
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
        """Writes a row of the log. Raises DivergedError if the loss is infinite or NaN."""
        if "loss" in logs and not math.isfinite(logs["loss"]):
            raise DivergedError(
                f"the loss became {logs['loss']} at step {state.global_step}; the last checkpoint "
                "is from before. Lower optim.lr, or raise optim.warm_up."
            )
        if not state.is_world_process_zero or "train_loss" in logs:  # of the whole run
            return
        row = {"step": state.global_step, "epoch": round(state.epoch or 0.0, 4)}
        if "loss" in logs:
            row |= self._step_row(state, logs, optimizer)
        else:
            row |= {
                key.removeprefix("eval_"): value
                for key, value in logs.items()
                if key.startswith("eval_")
                and not key.endswith(("runtime", "per_second", "preparation_time"))
            }
            row["kind"] = "eval"
            self.since = time.monotonic()  # evaluation does not count as training time
        self.run.log(row)
        self._show(state, row)

    def _step_row(self, state: Any, logs: Any, optimizer: Any) -> dict[str, Any]:
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
            "memory_bytes": peak_memory(),
        }

    def _show(self, state: Any, row: dict[str, Any]) -> None:
        text = as_text(row)
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
        """Removes the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def _rates(first: float, optimizer: Any) -> dict[str, Any]:
    """The rate of every group by name, if there are several; all follow one schedule."""
    groups = optimizer.param_groups if optimizer is not None else []
    rates = {
        group["name"]: first * group["initial_lr"] / groups[0]["initial_lr"] for group in groups
    }
    return {"lrs": rates} if len(rates) > 1 else {}


def as_text(row: dict[str, Any]) -> str:
    """Returns a row of the log as text."""
    if row["kind"] == "train":
        speed = f"  {row['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in row else ""
        return f"loss {row['loss']:.4f}  lr {row['lr']:.2e}{speed}"
    return "eval  " + "  ".join(
        f"{key} {value:.4f}"
        for key, value in row.items()
        if key not in ("step", "epoch", "kind") and isinstance(value, float)
    )


def peak_memory() -> int:
    """Returns the peak memory in bytes: of torch on CUDA, of the process elsewhere."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) * (1 if sys.platform == "darwin" else 1024)


def clock(seconds: float) -> str:
    """Returns "1:05", or "1:02:03" from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
