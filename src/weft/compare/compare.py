"""Runs a comparison: trains the missing runs, measures every row's cost, and builds the rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from typing import Any

from ..errors import WeftError
from .devices import check_device, cores, visible_gpus, worker_count
from .plan.budgets import PARAMETERS, SECONDS, with_ranks, with_steps
from .plan.entries import Entry, with_fitting_ranks, without_frozen
from .plan.scale import Scale
from .plan.sweep import Sweep, count_runs
from .report.comparison import Comparison, notes_of, row_of
from .request import Request
from .run.costs import has_scores, measure_rows
from .run.directory import LOGS, check_directory, has_comparison, prepare_directory
from .run.pool import Pool
from .run.progress import Progress
from .run.scheduler import Job, JobSource, Scheduler
from .run.study import Study
from .run.sweep_jobs import SweepJobs, adapter_of
from .run.trial_runner import RunnerConfig
from .tasks.base import Guess

TIMED = (
    "The number of steps is what fits into the time of a run, at the step time measured alone on "
    "this machine; attaching, auditing and scoring take additional time."
)
IDENTITY_NAMES = {
    "model": "weights of the model",
    "train": "training data",
    "validation": "validation data",
    "test": "test data",
}


def compare(request: Request, progress: Progress) -> Comparison:
    """Runs the missing trials and returns the rows. Finished runs are in the study if this is
    interrupted.

    Other processes can work on the same study at the same time: each claims its runs, and all of
    them return all rows. Raises ConfigError if the directory or the study has another comparison or
    the device does not exist, and WeftError if model, data or study cannot be used.
    """
    location = request.location
    check_directory(location, request.resume)
    check_device(request.device)
    if location.url is not None or has_comparison(location):
        with closing(Study(location)) as study:
            study.match(request.identity())
    with Pool(location.out / LOGS, visible_gpus() if request.device != "cpu" else ()) as pool:
        progress.message(f"Opening {request.model.name} and {request.task.name}.")
        scheduler = Scheduler(pool, asdict(_runner_config(request)))
        about = scheduler.start_first()
        prepare_directory(location)
        with Study(location) as study, pool:  # workers stop before their runs are released
            study.open(_identity(request, about), "minimize" if about["lowest"] else "maximize")
            if request.retry and (failed := study.retry()):
                progress.message(f"Trying {failed} failed run{'s' * (failed != 1)} once more.")
            return _run_comparison(request, about, study, scheduler, progress)


def _identity(request: Request, about: Mapping[str, Any]) -> dict[str, Any]:
    """The identity of the request and the facts: model, data, versions, and the machine if
    its speed decides the number of steps.
    """
    facts = {IDENTITY_NAMES.get(key, key): value for key, value in about["context"].items()}
    timed = {"machine": about["device"]} if request.budget.equal.what == SECONDS else {}
    return {**request.identity(), **facts, **timed}


def _run_comparison(
    request: Request,
    about: Mapping[str, Any],
    study: Study,
    scheduler: Scheduler,
    progress: Progress,
) -> Comparison:
    out, device, context = request.out, about["device"], about["context"]
    sweep, notes = _sweep_of(request, about)
    first = request.budget.equal.what == SECONDS  # the step times then decide the number of steps
    sweep, settings, budget_notes = _with_budget(
        request,
        sweep,
        scheduler,
        lambda sweep: _measure(sweep, sweep.entries, study, scheduler, progress, {}, device),
        about["narrowest"],
    )
    scheduler.size = worker_count(
        request.workers, about["context"]["device"], about["parameters"], len(scheduler.pool.gpus)
    )
    done = SweepJobs(sweep, study, out, progress, len(sweep.entries) if first else 0).train(
        scheduler
    )
    scheduler.keep_one_worker()
    scored = [entry for entry in sweep.entries if has_scores(sweep, entry, done)]
    costs = _measure(sweep, scored, study, scheduler, progress, done, device)
    adapters = {entry.label: adapter_of(sweep, entry, done, out) for entry in sweep.entries}
    rows = [
        row_of(sweep, entry, done, costs.get(entry.label), adapters[entry.label][0])
        for entry in sweep.entries
    ]
    elsewhere = [note for _, note in adapters.values() if note is not None]
    return Comparison(
        task=request.task.name,
        model=request.model.name,
        rows=rows,
        seeds=request.seeds,
        settings=settings,
        sizes=about["sizes"],
        classes=about["classes"],
        metric=about["metric"],
        head=sweep.head,
        kind=about["kind"],
        chosen_by=sweep.chosen_by,
        guess=None if about["guess"] is None else Guess(**about["guess"]),
        device=device,
        versions={name: context[name] for name in ("weft", "torch")},
        notes=[*notes, *budget_notes, *notes_of(sweep, done), *elsewhere],
    )


def _runner_config(request: Request) -> RunnerConfig:
    test = str(request.task.test) if request.task.test is not None else None
    return RunnerConfig(
        task=request.task.name,
        model=request.model.name,
        test=test,
        limits=request.budget.limits,
        device=request.device,
        threads=max(1, cores() // (request.workers or 1)),
    )


def _sweep_of(request: Request, about: Mapping[str, Any]) -> tuple[Sweep, list[str]]:
    everything = without_frozen(request.entries, about["frozen"])
    own = everything  # those whose rank is not chosen by the budget
    if request.budget.equal.what == PARAMETERS:
        own = own[:1] if request.budget.equal.amount is None else []
    fitted, notes = with_fitting_ranks(own, about["narrowest"])
    entries = [*fitted, *everything[len(own) :]]
    have = about["sizes"]["train"]
    if have < request.budget.batch:
        notes.append(
            f"A step has {have} examples instead of {request.budget.batch}: there are no more for "
            "training."
        )
    sweep = Sweep(
        entries,
        tuple(about["head"]),
        request.seeds,
        request.budget.steps,
        request.budget.batch,
        request.head_lr,
        about["context"],
        request.warm_up,
        request.weight_decay,
        Scale(about["chosen_by"], about["lowest"]),
        Scale(about["metric"]),
    )
    return sweep, [*about["notes"], *notes]


def _with_budget(
    request: Request,
    sweep: Sweep,
    scheduler: Scheduler,
    measured: Callable[[Sweep], Mapping[str, Any]],
    limit: int,
) -> tuple[Sweep, dict[str, Any], list[str]]:
    """Returns the sweep with the ranks or steps that the budget gives each row, the settings for
    the report, and notes.
    """
    equal = request.budget.equal
    settings: dict[str, Any] = {
        "budget": equal.what,
        "steps": sweep.steps,
        "batch": sweep.batch,
        "head_lr": sweep.head_lr,
        "warm_up": sweep.warm_up,
        "weight_decay": sweep.weight_decay,
    }
    if equal.what == PARAMETERS:
        configs = {
            entry.label: sweep.spec(entry, 0.0, 0, "final").config for entry in sweep.entries
        }
        target = int(equal.amount) if equal.amount is not None else None
        ranked = _ask(
            scheduler, {"do": "ranks", "configs": configs, "target": target, "limit": limit}
        )
        entries, notes = with_ranks(sweep.entries, ranked["rows"], ranked["target"])
        return replace(sweep, entries=entries), {**settings, "parameters": ranked["target"]}, notes
    if equal.what == SECONDS and equal.amount is not None:
        entries = with_steps(sweep.entries, equal.amount, measured(sweep))
        return (
            replace(sweep, entries=entries),
            {**settings, "steps": None, "seconds": equal.amount},
            [TIMED],
        )
    return sweep, settings, []


def _ask(scheduler: Scheduler, message: Mapping[str, Any]) -> dict[str, Any]:
    """Asks one worker. Raises WeftError with its reason if it cannot answer."""
    answers: list[dict[str, Any]] = []
    scheduler.run(
        JobSource(
            lambda: [] if answers else [Job("question", message)],
            lambda job, answer: answers.append(answer),
        )
    )
    if answers[0].get("lost"):
        raise WeftError(answers[0]["reason"])
    return answers[0]


def _measure(
    sweep: Sweep,
    entries: Sequence[Entry],
    study: Study,
    scheduler: Scheduler,
    progress: Progress,
    done: Mapping[str, Any],
    device: str,
) -> dict[str, dict[str, Any]]:
    """Returns the costs of these rows by label; the progress display continues after the finished
    runs.
    """
    before, total = count_runs(sweep, done)
    return measure_rows(
        sweep,
        entries,
        study,
        scheduler,
        lambda measured, what: progress.step(before + measured, total + len(entries), what),
        device,
    )
