"""One training run from a configuration: `weft train`."""

from __future__ import annotations

import importlib.util
import io
import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from torch import nn

from ..checkpoint.load import read
from ..errors import ConfigError, WeftError
from ..model.adapter import Adapter
from . import card, processes
from .audit import Snapshot, base_fingerprint, snapshot
from .config import REPORTERS, RunConfig
from .generate import check_room
from .losses import METRICS
from .prepare import Data, check_places, open_data, open_model
from .render import IGNORED, marked
from .resume import newest, read_state, refill
from .run_dir import RunDir

EPOCHS = 3  # where neither steps nor epochs are given


@dataclass
class Trained:
    """What a run leaves. `finished` False: it was stopped by Ctrl-C, and `--resume` goes on from
    `step`.
    """

    model: nn.Module
    adapter: Adapter
    tokenizer: Any
    out: Path
    step: int
    finished: bool
    evaluation: dict[str, Any] | None = None


def train(config: RunConfig, go_on: bool = False, stream: TextIO | None = None) -> Trained:
    """Train as `config` says, into `config.out`. `go_on`: from the newest whole checkpoint there,
    if there is one.

    Raises ConfigError before anything is loaded for what cannot be meant; then WeftError (data,
    model, AuditError, DivergedError).
    """
    stream = (stream or sys.stderr) if processes.first() else io.StringIO()
    run = RunDir(Path(config.out).expanduser())
    check_places(config)
    check_reporters(config)
    run.check(config, go_on)
    data = open_data(config)
    _check_best(config, data)
    batches = math.ceil(math.ceil(len(data.train) / config.train.batch) / processes.count())
    per_epoch = math.ceil(batches / config.train.accumulate)
    steps = config.train.steps or per_epoch * (config.train.epochs or EPOCHS)
    if config.optim.warm_up >= max(steps, 1):
        raise ConfigError(
            f"optim.warm_up={config.optim.warm_up:g} is all of the {steps} steps or more, so that "
            "optim.lr "
            "would never be reached. Lower it; below 1 it is a share of the steps."
        )
    model, adapter, missing = open_model(config, data)
    _check_answers(config, data, model)
    adapter.plan_steps(steps)
    before = snapshot(model, adapter.name)
    facts = _facts(data, adapter, steps)
    identity = _identity(data, adapter, before, missing)
    processes.wait(config.train.device)  # all have looked at the directory
    with run.alone() if processes.first() else nullcontext():
        found = run.begin(config, identity, facts) if processes.first() else None
        processes.wait(config.train.device)
        found = found if processes.first() else newest(run.checkpoints)
        for note in data.notes:
            print(note, file=stream)
        if go_on and found is None:
            print(
                f"{run.root} holds no whole checkpoint; the run begins at its first step.",
                file=stream,
            )
        print(
            f"{type(config.method).__name__}: {adapter.num_parameters:,} trained numbers; "
            f"{len(data.train)} samples, "
            f"{steps} steps" + (f"; going on from step {found[1]}" if found else ""),
            file=stream,
            flush=True,
        )
        return _run(config, run, data, adapter, before, steps, per_epoch, found, stream)


def _check_best(config: RunConfig, data: Data) -> None:
    best = config.eval.best
    known = METRICS[data.kind] + (
        (data.task.main_metric,) if data.task is not None and config.eval.records != 0 else ()
    )
    if best is not None and data.eval is None:
        raise ConfigError(f"eval.best={best!r}: there is no evaluation data.")
    if best is not None and best not in known:
        raise ConfigError(f"eval.best={best!r}: of {data.kind} there are {', '.join(known)}.")


def _check_answers(config: RunConfig, data: Data, model: nn.Module) -> None:
    """What will be generated at evaluations fits into the model: said now, and not after an
    epoch.
    """
    if (
        data.task is not None
        and data.renderer is not None
        and data.eval is not None
        and config.eval.records != 0
    ):
        records = data.task.eval_records("validation")[: config.eval.records]
        check_room(
            model.config,
            [data.renderer.prompt_ids(record["prompt"]) for record in records],
            data.task.generation,
        )


def _run(
    config: RunConfig,
    run: RunDir,
    data: Data,
    adapter: Adapter,
    before: Snapshot,
    steps: int,
    per_epoch: int,
    found: tuple[Path, int] | None,
    stream: TextIO,
) -> Trained:
    from . import callbacks, reports, trainer

    args = trainer.arguments(config, run.checkpoints, steps, per_epoch, data)
    if config.train.gradient_checkpointing:
        trainer.checkpointing(adapter.model)
    stop, log = callbacks.Stop(stream), callbacks.Log(run, stream)
    order = callbacks.Order(per_epoch, data.eval is not None)
    report = reports.Report(config)
    own = [
        callbacks.Audit(adapter, before, int(args.warmup_steps)),
        order,
        log,
        callbacks.Keep(adapter, config, run, stream),
        stop,
        report,
    ]
    with _tensorboard(run.root / "tensorboard"):
        engine = trainer.AdapterTrainer(adapter, config.optim, data, args, own, config.eval.records)
    order.order = engine.order
    with _told(run, stream):
        ended = False
        try:
            if found and callbacks.has_ended(
                found[0], config, steps
            ):  # it was killed while it wrote its result
                read_state(adapter, found[0])
                engine.state.global_step = found[1]
            else:
                engine.train(resume_from_checkpoint=str(found[0]) if found else None)
            ended = True
        finally:
            stop.restore()
            log.close()
            report.close(failed=not ended)
        engine.accelerator.unwrap_model(
            adapter.model, keep_fp32_wrapper=False
        )  # its forward is the model's own again
        step = engine.state.global_step
        processes.wait(config.train.device)
        if stop.asked and step < steps:
            if processes.first():
                run.finish(status="interrupted", steps_done=step)
            return Trained(adapter.model, adapter, data.tokenizer, run.root, step, False)
        chosen = _choose(config, run, adapter, stream)
        if processes.first():
            _write(config, run, adapter, data, step, chosen)
        return Trained(adapter.model, adapter, data.tokenizer, run.root, step, True, chosen)


@contextmanager
def _told(run: RunDir, stream: TextIO) -> Iterator[None]:
    """What ends a run early is in run.json, and what is left of it is said. Raises WeftError where
    the disk refused.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        found = newest(run.checkpoints)
        kept = (
            f"the newest whole checkpoint is of step {found[1]}"
            if found
            else "there is no whole checkpoint yet"
        )
        if processes.first():
            stopped = isinstance(error, KeyboardInterrupt)
            with suppress(OSError, WeftError):  # the disk may be why
                run.finish(
                    **(
                        {"status": "interrupted", "steps_done": found[1] if found else 0}
                        if stopped
                        else {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
                    )
                )
        if isinstance(error, KeyboardInterrupt):
            print(
                f"Stopped at once; {kept}, and --resume goes on from there.",
                file=stream,
                flush=True,
            )
        if isinstance(error, OSError):
            raise WeftError(
                f"{run.root} could not be written to ({error}); {kept}. Make room there, and go on "
                "with "
                "--resume."
            ) from error
        raise


@contextmanager
def _tensorboard(folder: Path) -> Iterator[None]:
    """The Trainer's reporter learns its folder from this variable alone; one that the user has set
    stays.
    """
    name = "TENSORBOARD_LOGGING_DIR"
    before = os.environ.get(name)
    os.environ[name] = before or str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]


def _choose(
    config: RunConfig, run: RunDir, adapter: Adapter, stream: TextIO
) -> dict[str, Any] | None:
    """The evaluation whose adapter is the result; where that is the best one, its tensors are put
    back.
    """
    from .callbacks import best_place, scores

    held = [row for row in run.rows() if row["kind"] == "eval"]
    if not held:
        return None
    if config.eval.best is None:
        return held[-1]
    values = scores(held, config.eval, prefix="")
    place = best_place(values)
    if not math.isfinite(values[place]):
        print(
            f"eval.best={config.eval.best} had no value at any evaluation; the last adapter is "
            "kept.",
            file=stream,
        )
        return held[-1]
    if place != len(held) - 1:
        refill(adapter, run.best)
    return held[place]


def _write(
    config: RunConfig,
    run: RunDir,
    adapter: Adapter,
    data: Data,
    step: int,
    chosen: dict[str, Any] | None,
) -> None:
    adapter.save(run.adapter)
    if data.tokenizer is not None:
        data.tokenizer.save_pretrained(run.adapter)
    rows = run.rows()
    last = [row["loss"] for row in rows if row["kind"] == "train"]
    run.finish(
        status="finished", steps_done=step, evaluation=chosen, last_loss=last[-1] if last else None
    )
    record, readable = run.read(), read(run.adapter).peft_reads_it
    run.put("README.md", card.card(record, "adapter", readable))
    RunDir(run.adapter).put("README.md", card.card(record, ".", readable))
    card.draw(
        rows, run.root / "curves.png", f"{type(config.method).__name__} on {config.model.path}"
    )


def _facts(data: Data, adapter: Adapter, steps: int) -> dict[str, Any]:
    return {
        "kind": data.kind,
        "format": data.format,
        "classes": data.classes and list(data.classes),
        "steps": steps,
        "samples": len(data.train),
        "eval_samples": None if data.eval is None else len(data.eval),
        "trained_numbers": adapter.num_parameters,
        "head_numbers": adapter.num_head_parameters,
        "counts": vars(data.train.counts),
        "started_from": data.started,
        "notes": data.notes,
    }


def _identity(data: Data, adapter: Adapter, before: Snapshot, missing: list[str]) -> dict[str, Any]:
    """What must be the same for a run to go on."""
    return {
        "model": base_fingerprint(before.base, missing),
        "train": data.train.fingerprint(),
        "eval": None if data.eval is None else data.eval.fingerprint(),
        "processes": processes.count(),
        "start": None if data.started is None else data.started["fingerprint"],
        "trained": {
            name: f"{list(p.shape)} {str(p.dtype).removeprefix('torch.')}"
            for name, p in adapter.named_parameters()
        },
    }


def finished(config: RunConfig) -> int | None:
    """Steps of the run in `config.out`, where that is this run and it has come to its end. Raises
    ConfigError (another).
    """
    run = RunDir(Path(config.out).expanduser())
    run.check(config, True)
    record = run.read() if run.record.is_file() else {}
    return record["steps_done"] if record.get("status") == "finished" else None


def check_reporters(config: RunConfig) -> None:
    """The packages for log.report_to are there. Raises ConfigError, naming what to install."""
    for name in config.log.report_to:
        if importlib.util.find_spec(REPORTERS[name]) is None:
            raise ConfigError(
                f"log.report_to: {name} needs the package {REPORTERS[name]}: pip install "
                f"{REPORTERS[name]}"
            )


def preview(config: RunConfig, count: int = 3) -> str:
    """The first samples as the model reads them, what is in the loss between ⟦ and ⟧, and what was
    counted.

    Loads the tokenizer and the data, no weights.
    """
    data = open_data(config)
    parts = []
    for number in range(1, min(count, len(data.train)) + 1):
        row = data.train[number - 1]
        if "pixel_values" in row:
            parts.append(
                f"sample {number} of {len(data.train)}: pixels {list(row['pixel_values'].shape)}, "
                "label "
                f"{(data.classes or ())[row['labels']]}\n"
            )
            continue
        ids, labels = row["input_ids"], row["labels"]
        if not isinstance(labels, int | float):
            inside = sum(label != IGNORED for label in labels)
            head, text = (
                f"{len(ids)} tokens, {inside} in the loss",
                marked(data.tokenizer, ids, labels),
            )
        else:
            said = data.classes[int(labels)] if data.classes else labels
            head, text = f"{len(ids)} tokens, label {said}", data.tokenizer.decode(list(ids))
        parts.append(f"sample {number} of {len(data.train)}: {head}\n{text}\n")
    counts: Mapping[str, int] = vars(data.train.counts)
    parts.append(
        f"{counts['samples']} samples ({data.format}); "
        + ", ".join(
            f"{text} {counts[key]}"
            for key, text in (
                ("cut", "cut off"),
                ("end_cut", "end-of-turn cut off"),
                ("end_masked", "end-of-turn masked"),
                ("empty", "nothing in the loss"),
            )
        )
    )
    return "\n".join(parts + data.notes)


__all__ = ["Trained", "check_reporters", "preview", "train"]
