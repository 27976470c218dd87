"""Which runs are planned: played through with results from a formula in place of training."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.compare.plan.entries import GROWTH_LIMIT, parse_methods
from weft.compare.plan.scale import Scale
from weft.compare.plan.sweep import TUNING_SEEDS, RunSpec, Sweep, count_runs, missing, tune
from weft.compare.report.comparison import notes_of, row_of

CONTEXT = {
    "model": "m",
    "train": "a",
    "validation": "b",
    "test": "c",
    "weft": "1",
    "torch": "2",
    "device": "cpu",
}


def sweep_of(methods: str = "lora,vera:r=5", seeds: int = 3) -> Sweep:
    return Sweep(parse_methods(methods), ("classifier",), seeds, 10, 4, 1e-2, CONTEXT)


def peaked(at: float) -> Callable[[RunSpec], dict[str, Any]]:
    """A run that scores best with the rate `at`."""

    def run(spec: RunSpec) -> dict[str, Any]:
        score = {"score": 1 - 0.1 * abs(math.log10(spec.lr / at)), "loss": 1.0}
        final = {"test": score, "bytes": 99} if spec.purpose == "final" else {}
        return {
            "status": "finished",
            "validation": score,
            "trainable": 5,
            "head_trainable": 2,
            "losses": [1.0],
            **final,
        }

    return run


def play(
    sweep: Sweep, run: Callable[[RunSpec], dict[str, Any]], done: dict[str, Any]
) -> list[RunSpec]:
    """Do what is missing, one run at a time, and return the runs in their order."""
    order = []
    while waiting := missing(sweep, done):
        order.append(waiting[0])
        done[sweep.key(waiting[0])] = run(waiting[0])
        assert len(order) < 200
    return order


@settings(deadline=None, max_examples=15)
@given(st.floats(-6, 2))
def test_the_best_rate_is_found_wherever_the_grid_can_reach_it(exponent: float) -> None:
    sweep, done = sweep_of(), {}
    order = play(sweep, peaked(10**exponent), done)
    for entry in sweep.entries:
        tuned = tune(sweep, entry, done)
        assert tuned.lr == max(tuned.scores, key=lambda lr: tuned.scores[lr][0])
        assert len(tuned.tried) <= len(entry.lrs) + GROWTH_LIMIT
        assert tuned.edge == (tuned.lr in (min(tuned.tried), max(tuned.tried)))
        if tuned.edge:
            assert len(tuned.tried) == len(entry.lrs) + GROWTH_LIMIT
            assert any(
                note.startswith(f"{entry.label}: the best learning rate")
                for note in notes_of(sweep, done)
            )
        finals = [spec for spec in order if spec.label == entry.label and spec.purpose == "final"]
        assert [(spec.seed, spec.lr) for spec in finals] == [(seed, tuned.lr) for seed in range(3)]
    assert len({sweep.key(spec) for spec in order}) == len(order)


def test_progress_ends_at_its_total_and_counts_every_run() -> None:
    sweep, done = sweep_of(), {}
    assert count_runs(sweep, done) == (0, 2 * (3 * len(TUNING_SEEDS) + 3))
    order = play(sweep, peaked(1.0), done)
    assert count_runs(sweep, done) == (len(order), len(order))


def test_what_is_missing_depends_on_what_is_done_and_not_on_the_order_in_which_it_was_done() -> (
    None
):
    sweep, done = sweep_of(), {}
    order = play(sweep, peaked(1e-2), done)
    for stop in range(len(order)):
        part = {sweep.key(spec): done[sweep.key(spec)] for spec in order[:stop]}
        backwards = dict(reversed(part.items()))
        assert missing(sweep, part) == missing(sweep, backwards)
        assert {sweep.key(spec) for spec in play(sweep, peaked(1e-2), part)} == set(done) - set(
            backwards
        )


def test_methods_take_turns() -> None:
    labels = [spec.label for spec in missing(sweep_of(), {})]
    assert labels[:4] == ["LoRA", "VeRA r=5"] * 2


def test_a_tuning_run_s_key_knows_nothing_of_the_test_split() -> None:
    sweep = sweep_of()
    other = replace(sweep, context={**CONTEXT, "test": "other"})
    entry = sweep.entries[0]
    tuning, final = (sweep.spec(entry, 1e-2, 0, purpose) for purpose in ("tune", "final"))
    assert sweep.key(tuning) == other.key(tuning)
    assert sweep.key(final) != other.key(final)


@pytest.mark.parametrize(
    "change",
    [
        {"lr": 2.0},
        {"seed": 9},
        {"steps": 11},
        {"batch": 5},
        {"head_lr": 2.0},
        {"config": {"method": "Full"}},
    ],
)
def test_every_field_of_a_run_is_in_its_key(change: dict[str, Any]) -> None:
    sweep = sweep_of()
    spec = sweep.spec(sweep.entries[0], 1e-2, 0, "tune")
    assert replace(spec, **change).key(CONTEXT) != spec.key(CONTEXT)
    assert replace(spec, label="another name").key(CONTEXT) == spec.key(CONTEXT)


def test_a_rate_that_diverges_is_left_out_and_named() -> None:
    sweep, done = sweep_of("lora"), {}

    def run(spec: RunSpec) -> dict[str, Any]:
        return (
            {"status": "failed", "reason": "the loss became nan"}
            if spec.lr > 1e-2
            else peaked(1e-2)(spec)
        )

    play(sweep, run, done)
    tuned = tune(sweep, sweep.entries[0], done)
    assert tuned.lr == 1e-2
    assert "LoRA: training failed with the learning rate 3e-2: the loss became nan." in notes_of(
        sweep, done
    )
    assert row_of(sweep, sweep.entries[0], done, {}, "x").status == "finished"


def test_a_row_without_a_rate_that_trains_fails_with_the_reason() -> None:
    sweep, done = sweep_of("lora"), {}
    play(sweep, lambda spec: {"status": "failed", "reason": "the loss became nan"}, done)
    row = row_of(sweep, sweep.entries[0], done, None, "x")
    assert (row.status, row.complete, row.mean, row.interval) == ("failed", None, None, None)
    assert "the loss became nan" in (row.reason or "")
    assert count_runs(sweep, done) == (len(done), len(done))


def test_a_lost_tuning_run_fails_the_row_and_is_done_again_on_another_day() -> None:
    sweep, done = sweep_of("lora"), {}
    lost = sweep.key(missing(sweep, {})[1])

    def run(spec: RunSpec) -> dict[str, Any]:
        gone = {"status": "failed", "reason": "killed", "lost": True}
        return gone if sweep.key(spec) == lost else peaked(1e-2)(spec)

    play(sweep, run, done)
    assert (
        row_of(sweep, sweep.entries[0], done, None, "x").reason == "a tuning run was lost: killed"
    )
    del done[lost]  # lost runs are never written to the disk
    play(sweep, peaked(1e-2), done)
    assert row_of(sweep, sweep.entries[0], done, None, "x").status == "finished"


def test_a_failed_seed_fails_the_row_and_leaves_its_place_empty() -> None:
    sweep, done = sweep_of("lora"), {}

    def run(spec: RunSpec) -> dict[str, Any]:
        bad = spec.purpose == "final" and spec.seed == 1
        return {"status": "failed", "reason": "AuditError: x"} if bad else peaked(1e-2)(spec)

    play(sweep, run, done)
    row = row_of(sweep, sweep.entries[0], done, None, "x")
    assert row.scores == [1.0, None, 1.0]
    assert (row.reason, row.complete) == ("seed 1: AuditError: x", None)


def test_the_lowest_is_chosen_where_the_validation_score_is_a_loss() -> None:
    plan = replace(sweep_of("lora"), chosen_by=Scale("loss", lowest=True))
    (entry,) = plan.entries

    def run(spec: RunSpec) -> dict[str, Any]:
        loss = 2 + abs(math.log10(spec.lr / 1e-2))
        return {**peaked(1e-2)(spec), "validation": {"score": loss, "loss": loss}}

    done: dict[str, Any] = {}
    play(plan, run, done)
    assert tune(plan, entry, done).lr == 1e-2
    told = [
        Scale("loss", True).with_metric(2.0),
        Scale("BLEU").with_metric(0.31),
        Scale("F1").with_metric(0.5),
    ]
    assert told == ["loss 2.000", "BLEU 31.0", "50.0 %"]
