"""The comparison itself: every run that is missing, then every row's cost alone, then the rows."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from ..errors import ConfigError, WeftError
from .bench import SMALL, Opening
from .budgets import PARAMETERS, SECONDS, with_ranks, with_steps
from .costs import has_scores, measure
from .dispatch import Crew, Order
from .entries import Entry, fit, rate
from .plan import RunSpec, Sweep, finals, missing, progress, tune
from .pool import Pool
from .progress import Progress
from .request import Request
from .results import Comparison, notes_of, row_of
from .scale import Scale
from .store import LOGS, Store

TIMED = ("Steps are as many as fit into the time of a run at the step time measured here, with nothing beside it; "
         "attaching, auditing and scoring come on top.")
MOST_WORKERS = 16  # each holds its own model and libraries, some 0.5 GB
NAMES = {"model": "weights of the model", "train": "training data", "validation": "validation data",
         "test": "test data"}


def compare(request: Request, shown: Progress) -> Comparison:
    """Do what is missing and return the table's rows. What has finished is on the disk whenever this is interrupted.

    Raises ConfigError (the directory holds something else, no such device), WeftError (model or data cannot be used).
    """
    Store.check(request.out, request.resume)
    store = Store(request.out)
    store.match(request.identity())
    _check_device(request.device)
    with Pool(store.root / LOGS) as pool:
        shown.say(f"Opening {request.model.name} and {request.task.name}.")
        crew = Crew(pool, asdict(_opening(request)))
        about = crew.open_first()
        store.open({**request.identity(), **{NAMES.get(key, key): value for key, value in about["context"].items()}})
        sweep, notes = _resolve(request, about)
        first = request.budget.equal.what == SECONDS  # then the step times say how long the runs are
        sweep, settings, told = _budgeted(request, sweep, crew, lambda sweep: _measure(
            sweep, sweep.entries, store, crew, shown, {}, about["device"]), about["narrowest"])
        crew.size = _workers(request.workers, about)
        done = _train(sweep, store, crew, shown, len(sweep.entries) if first else 0)
        crew.shrink()
        scored = [entry for entry in sweep.entries if has_scores(sweep, entry, done)]
        costs = _measure(sweep, scored, store, crew, shown, done, about["device"])
    rows = [row_of(sweep, entry, done, costs.get(entry.label), str(store.adapter_path(entry.label)))
            for entry in sweep.entries]
    context = about["context"]
    return Comparison(
        task=request.task.name, model=request.model.name, rows=rows, seeds=request.seeds,
        settings=settings, sizes=about["sizes"], classes=about["classes"], metric=about["metric"], head=sweep.head,
        kind=about["kind"], chosen_by=sweep.chosen_by,
        device=about["device"], versions={name: context[name] for name in ("weft", "torch")},
        notes=[*notes, *told, *notes_of(sweep, done)])


def _check_device(device: str) -> None:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no CUDA device here. See `weft doctor`.")


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _opening(request: Request) -> Opening:
    test = str(request.task.test) if request.task.test is not None else None
    return Opening(task=request.task.name, model=request.model.name, test=test, most=request.budget.most,
                   device=request.device, threads=max(1, cores() // (request.workers or 1)))


def _workers(asked: int | None, about: Mapping[str, Any]) -> int:
    """Small models: one single-threaded worker a core. Others, and a GPU: one worker with everything."""
    if asked is not None:
        return asked
    alone = about["parameters"] >= SMALL or about["context"]["device"] == "cuda"
    return 1 if alone else min(cores(), MOST_WORKERS)


def _resolve(request: Request, about: Mapping[str, Any]) -> tuple[Sweep, list[str]]:
    own = request.entries  # those whose rank is not chosen by the budget
    if request.budget.equal.what == PARAMETERS:
        own = own[:1] if request.budget.equal.amount is None else []
    fitted, notes = fit(own, about["narrowest"])
    entries = [*fitted, *request.entries[len(own):]]
    have = about["sizes"]["train"]
    if have < request.budget.batch:
        notes.append(f"A step sees {have} examples, not {request.budget.batch}: there are no more for training.")
    sweep = Sweep(entries, tuple(about["head"]), request.seeds, request.budget.steps, request.budget.batch,
                  request.head_lr, about["context"], request.warm_up, request.weight_decay,
                  Scale(about["chosen_by"], about["lowest"]), Scale(about["metric"]))
    return sweep, [*about["notes"], *notes]


def _train(sweep: Sweep, store: Store, crew: Crew, shown: Progress, measured: int) -> dict[str, dict[str, Any]]:
    """Every run of the sweep, finished ones from the store. `measured` rows have been, for the progress."""
    done, saved = store.runs(), store.adapters()

    def orders() -> list[Order]:
        specs = [*missing(sweep, done), *_without_adapter(sweep, done, saved)]
        return [Order(sweep.key(spec), {"do": "run", "spec": asdict(spec), "save_to": _save_to(store, spec)})
                for spec in specs]

    def finished(order: Order, result: dict[str, Any]) -> None:
        label = order.message["spec"]["label"]
        if order.message["save_to"] and result["status"] == "finished":
            store.add_adapter(label, order.key)
            saved[label] = order.key
        if not result.get("lost"):
            store.add_run(order.key, result)
        done[order.key] = result
        shown.step(*_progress(sweep, done, measured), _told(sweep, order.message["spec"], result))

    shown.start(*_progress(sweep, done, measured))
    crew.work(orders, finished)
    return done


def _progress(sweep: Sweep, done: Mapping[str, Any], measured: int) -> tuple[int, int]:
    """The measurements count as one run each."""
    finished, total = progress(sweep, done)
    return finished + measured, total + len(sweep.entries)


def _save_to(store: Store, spec: RunSpec) -> str | None:
    return str(store.adapter_path(spec.label)) if spec.purpose == "final" and spec.seed == 0 else None


def _without_adapter(sweep: Sweep, done: Mapping[str, Mapping[str, Any]], saved: Mapping[str, str]) -> list[RunSpec]:
    """Finished runs whose adapter is not in its place: another rate was in force in between, or a row has a twin."""
    specs = []
    for entry in sweep.entries:
        lr = tune(sweep, entry, done).lr
        first = finals(sweep, entry, lr)[0] if lr is not None else None
        if first and done.get(sweep.key(first), {}).get("status") == "finished":
            specs += [first] if saved.get(entry.label) != sweep.key(first) else []
    return specs


def _told(sweep: Sweep, spec: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """One run in half a line."""
    what = f"{spec['label']} lr {rate(spec['lr'])} seed {spec['seed']}"
    if result["status"] != "finished":
        return f"{what} failed: {result['reason']}"
    split, scale = ("test", sweep.scored_by) if spec["purpose"] == "final" else ("validation", sweep.chosen_by)
    return f"{what} {split} {scale.told(result[split]['score'])}"


def _budgeted(request: Request, sweep: Sweep, crew: Crew, measured: Callable[[Sweep], Mapping[str, Any]], most: int
              ) -> tuple[Sweep, dict[str, Any], list[str]]:
    """The sweep with the ranks or the steps that its budget gives each row, the settings to report, and notes."""
    equal = request.budget.equal
    settings: dict[str, Any] = {"budget": equal.what, "steps": sweep.steps, "batch": sweep.batch,
                                "head_lr": sweep.head_lr, "warm_up": sweep.warm_up, "weight_decay": sweep.weight_decay}
    if equal.what == PARAMETERS:
        configs = {entry.label: sweep.spec(entry, 0.0, 0, "final").config for entry in sweep.entries}
        target = int(equal.amount) if equal.amount is not None else None
        found = _ask(crew, {"do": "ranks", "configs": configs, "target": target, "most": most})
        entries, notes = with_ranks(sweep.entries, found["rows"], found["target"])
        return replace(sweep, entries=entries), {**settings, "parameters": found["target"]}, notes
    if equal.what == SECONDS and equal.amount is not None:
        entries = with_steps(sweep.entries, equal.amount, measured(sweep))
        return replace(sweep, entries=entries), {**settings, "steps": None, "seconds": equal.amount}, [TIMED]
    return sweep, settings, []


def _ask(crew: Crew, message: Mapping[str, Any]) -> dict[str, Any]:
    """One question to a worker. Raises WeftError with its reason where it has no answer."""
    answers: list[dict[str, Any]] = []
    crew.work(lambda: [] if answers else [Order("question", message)], lambda order, answer: answers.append(answer))
    if answers[0].get("lost"):
        raise WeftError(answers[0]["reason"])
    return answers[0]


def _measure(sweep: Sweep, entries: Sequence[Entry], store: Store, crew: Crew, shown: Progress, done: Mapping[str, Any],
             device: str) -> dict[str, dict[str, Any]]:
    """The costs of these rows, by label; the progress goes on from the runs that are done."""
    before, total = progress(sweep, done)
    return measure(sweep, entries, store, crew,
                   lambda measured, what: shown.step(before + measured, total + len(entries), what), device)
