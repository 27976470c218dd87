"""One training run: `weft train`, from the configuration to the result."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from torch import nn

from ..auditing.snapshot import Snapshot, snapshot
from ..model.adapter import Adapter
from . import processes, record
from .adapted import Adapted, load_adapted
from .checks import check_best, check_packages, check_prompts_fit
from .config.sections import RunConfig
from .prepare import Data, Length, find_sources, length_of, open_data
from .previews import preview
from .result import choose, failures_recorded, write_result
from .resume import newest
from .run_dir import RunDir


@dataclass
class Trained:
    """The outcome of a run. If `finished` is False, Ctrl-C stopped it at `step`, and `--resume`
    continues from there.
    """

    model: nn.Module
    adapter: Adapter
    tokenizer: Any
    out: Path
    step: int
    finished: bool
    evaluation: dict[str, Any] | None = None


def train(config: RunConfig, go_on: bool = False, stream: TextIO | None = None) -> Trained:
    """Trains as `config` describes, into the directory `config.out`. `go_on` resumes from the
    newest whole checkpoint there, if there is one. Progress is printed to `stream` (stderr).

    Raises ConfigError for an invalid configuration, before anything is loaded; then WeftError if
    data or model cannot be used, AuditError, and DivergedError.
    """
    stream = (stream or sys.stderr) if processes.first() else io.StringIO()
    run = RunDir(Path(config.out).expanduser())

    # Configuration: nothing is loaded yet.
    sources = find_sources(config)
    check_packages(config)
    run.check(config, go_on)

    # Data.
    data = open_data(config, sources, run.rendered_at() if go_on else None)
    check_best(config, data)
    length = length_of(config, len(data.train))

    # Model with adapter.
    adapted = load_adapted(config, data)
    adapter = adapted.adapter
    check_prompts_fit(config, data, adapter.model)
    adapter.plan_steps(length.steps)
    before = snapshot(adapter.model, adapter.name)

    with _alone_in(run, config):
        # Directory.
        checkpoint = _begin(run, config, data, adapted, before, length)
        _announce(stream, config, data, adapted, length, checkpoint, run if go_on else None)

        # Trainer and loop.
        from .loop import Loop  # it imports transformers

        loop = Loop(config, run, data, adapter, before, length, stream)
        with failures_recorded(run, stream):
            step = loop.run(checkpoint)
            processes.wait(config.train.device)

            # End.
            chosen = None
            if loop.interrupted:
                if processes.first():
                    run.finish(status="interrupted", steps_done=step)
            else:
                chosen = choose(config, run, adapter, stream)
                if processes.first():
                    write_result(config, run, adapter, data, step, chosen)
    return Trained(
        model=adapter.model,
        adapter=adapter,
        tokenizer=data.tokenizer,
        out=run.root,
        step=step,
        finished=not loop.interrupted,
        evaluation=chosen,
    )


@contextmanager
def _alone_in(run: RunDir, config: RunConfig) -> Iterator[None]:
    """Locks the directory, once all processes of the run have looked at it."""
    processes.wait(config.train.device)
    if processes.first():
        with run.alone():
            yield
    else:
        yield


def _begin(
    run: RunDir, config: RunConfig, data: Data, adapted: Adapted, before: Snapshot, length: Length
) -> tuple[Path, int] | None:
    """Writes the directory's first files, and returns the checkpoint to resume from with its
    step.
    """
    identity = record.identity(data, adapted, before)
    found = None
    if processes.first():
        found = run.begin(config, identity, record.facts(data, adapted, length.steps))
        if data.files is not None:
            run.put_tokenizer(data.files)
    processes.wait(config.train.device)
    return found if processes.first() else newest(run.checkpoints)


def _announce(
    stream: TextIO,
    config: RunConfig,
    data: Data,
    adapted: Adapted,
    length: Length,
    checkpoint: tuple[Path, int] | None,
    resumed: RunDir | None,
) -> None:
    for note in data.notes + adapted.notes:
        print(note, file=stream)
    if resumed is not None and checkpoint is None:
        print(
            f"{resumed.root} has no whole checkpoint; the run begins at its first step.",
            file=stream,
        )
    print(
        f"{type(config.method).__name__}: {adapted.adapter.num_parameters:,} trained numbers; "
        f"{len(data.train)} samples, {length.steps} steps"
        + (f"; resuming from step {checkpoint[1]}" if checkpoint else ""),
        file=stream,
        flush=True,
    )


def finished_step(config: RunConfig) -> int | None:
    """Returns the last step of the run in `config.out` if that run is finished, else None. Raises
    ConfigError if it is not a run of this configuration.
    """
    run = RunDir(Path(config.out).expanduser())
    run.check(config, True)
    found = run.read() if run.record.is_file() else {}
    return found["steps_done"] if found.get("status") == "finished" else None


__all__ = ["Trained", "finished_step", "preview", "train"]
