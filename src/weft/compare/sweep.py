"""The comparison itself: every run that is missing, then every row's cost alone, then the rows."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from typing import Any

from ..errors import ConfigError, WeftError
from .bench import SMALL, Opening
from .budgets import PARAMETERS, SECONDS, with_ranks, with_steps
from .costs import has_scores, measure
from .dispatch import Crew, Jobs, Order
from .entries import Entry, fit
from .plan import Sweep, progress
from .pool import Pool
from .progress import Progress
from .request import Request
from .results import Comparison, notes_of, row_of
from .runs import Runs, adapter_of
from .scale import Scale
from .store import LOGS, check, is_there, prepare
from .study import Study

TIMED = (
    "Steps are as many as fit into the time of a run at the step time measured here, with nothing "
    "beside it; "
    "attaching, auditing and scoring come on top."
)
MOST_WORKERS = 16  # each holds its own model and libraries, some 0.5 GB
NAMES = {
    "model": "weights of the model",
    "train": "training data",
    "validation": "validation data",
    "test": "test data",
}


def compare(request: Request, shown: Progress) -> Comparison:
    """Do what is missing and return the table's rows. What has finished is in the study whenever
    this is interrupted.

    Other processes may work on the same study at the same time: each takes what nobody has, and
    returns all rows. Raises ConfigError (the directory or the study holds something else, no such
    device), WeftError (model or data cannot be used, the study cannot be reached).
    """
    place = request.place
    check(place, request.resume)
    _check_device(request.device)
    if place.url is not None or is_there(place):
        with closing(Study(place)) as study:
            study.match(request.identity())
    with Pool(place.out / LOGS, gpus() if request.device != "cpu" else ()) as pool:
        shown.say(f"Opening {request.model.name} and {request.task.name}.")
        crew = Crew(pool, asdict(_opening(request)))
        about = crew.open_first()
        prepare(place)
        with Study(place) as study, pool:  # the workers end before their runs are given back
            study.open(_identity(request, about), "minimize" if about["lowest"] else "maximize")
            if request.retry and (failed := study.retry()):
                shown.say(
                    f"{failed} run{'s' * (failed != 1)} that failed "
                    f"{'are' if failed != 1 else 'is'} tried once more."
                )
            return _compared(request, about, study, crew, shown)


def _identity(request: Request, about: Mapping[str, Any]) -> dict[str, Any]:
    """What was asked and what was found: model, data, versions, and the machine where its speed
    decides the steps.
    """
    found = {NAMES.get(key, key): value for key, value in about["context"].items()}
    timed = {"machine": about["device"]} if request.budget.equal.what == SECONDS else {}
    return {**request.identity(), **found, **timed}


def _compared(
    request: Request, about: Mapping[str, Any], study: Study, crew: Crew, shown: Progress
) -> Comparison:
    out, device, context = request.out, about["device"], about["context"]
    sweep, notes = _resolve(request, about)
    first = request.budget.equal.what == SECONDS  # then the step times say how long the runs are
    sweep, settings, told = _budgeted(
        request,
        sweep,
        crew,
        lambda sweep: _measure(sweep, sweep.entries, study, crew, shown, {}, device),
        about["narrowest"],
    )
    crew.size = _workers(request.workers, about, len(crew.pool.gpus))
    done = Runs(sweep, study, out, shown, len(sweep.entries) if first else 0).train(crew)
    crew.shrink()
    scored = [entry for entry in sweep.entries if has_scores(sweep, entry, done)]
    costs = _measure(sweep, scored, study, crew, shown, done, device)
    adapters = {entry.label: adapter_of(sweep, entry, done, out) for entry in sweep.entries}
    rows = [
        row_of(sweep, entry, done, costs.get(entry.label), adapters[entry.label][0])
        for entry in sweep.entries
    ]
    elsewhere = [where for _, where in adapters.values() if where is not None]
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
        device=device,
        versions={name: context[name] for name in ("weft", "torch")},
        notes=[*notes, *told, *notes_of(sweep, done), *elsewhere],
    )


def _check_device(device: str) -> None:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no CUDA device here. See `weft doctor`.")


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _opening(request: Request) -> Opening:
    test = str(request.task.test) if request.task.test is not None else None
    return Opening(
        task=request.task.name,
        model=request.model.name,
        test=test,
        most=request.budget.most,
        device=request.device,
        threads=max(1, cores() // (request.workers or 1)),
    )


def gpus() -> list[str]:
    """The CUDA devices that torch sees, as CUDA_VISIBLE_DEVICES writes them."""
    import torch

    count = torch.cuda.device_count()
    named = [
        name.strip()
        for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        if name.strip()
    ]
    return (named or [str(place) for place in range(count)])[:count]


def _workers(asked: int | None, about: Mapping[str, Any], gpus: int) -> int:
    """Small models: one single-threaded worker a core. Others: one with all cores. On GPUs: one
    each.
    """
    if asked is not None:
        return asked
    if about["context"]["device"] == "cuda":
        return max(1, gpus)
    return 1 if about["parameters"] >= SMALL else min(cores(), MOST_WORKERS)


def _resolve(request: Request, about: Mapping[str, Any]) -> tuple[Sweep, list[str]]:
    own = request.entries  # those whose rank is not chosen by the budget
    if request.budget.equal.what == PARAMETERS:
        own = own[:1] if request.budget.equal.amount is None else []
    fitted, notes = fit(own, about["narrowest"])
    entries = [*fitted, *request.entries[len(own) :]]
    have = about["sizes"]["train"]
    if have < request.budget.batch:
        notes.append(
            f"A step sees {have} examples, not {request.budget.batch}: there are no more for "
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


def _budgeted(
    request: Request,
    sweep: Sweep,
    crew: Crew,
    measured: Callable[[Sweep], Mapping[str, Any]],
    most: int,
) -> tuple[Sweep, dict[str, Any], list[str]]:
    """The sweep with the ranks or the steps that its budget gives each row, the settings to report,
    and notes.
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
        found = _ask(crew, {"do": "ranks", "configs": configs, "target": target, "most": most})
        entries, notes = with_ranks(sweep.entries, found["rows"], found["target"])
        return replace(sweep, entries=entries), {**settings, "parameters": found["target"]}, notes
    if equal.what == SECONDS and equal.amount is not None:
        entries = with_steps(sweep.entries, equal.amount, measured(sweep))
        return (
            replace(sweep, entries=entries),
            {**settings, "steps": None, "seconds": equal.amount},
            [TIMED],
        )
    return sweep, settings, []


def _ask(crew: Crew, message: Mapping[str, Any]) -> dict[str, Any]:
    """One question to a worker. Raises WeftError with its reason where it has no answer."""
    answers: list[dict[str, Any]] = []
    crew.work(
        Jobs(
            lambda: [] if answers else [Order("question", message)],
            lambda order, answer: answers.append(answer),
        )
    )
    if answers[0].get("lost"):
        raise WeftError(answers[0]["reason"])
    return answers[0]


def _measure(
    sweep: Sweep,
    entries: Sequence[Entry],
    study: Study,
    crew: Crew,
    shown: Progress,
    done: Mapping[str, Any],
    device: str,
) -> dict[str, dict[str, Any]]:
    """The costs of these rows, by label; the progress goes on from the runs that are done."""
    before, total = progress(sweep, done)
    return measure(
        sweep,
        entries,
        study,
        crew,
        lambda measured, what: shown.step(before + measured, total + len(entries), what),
        device,
    )
