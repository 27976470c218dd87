"""Rows, learning rates and budgets as they are written on the command line."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

import weft
from weft.compare.plan.entries import (
    DEFAULT,
    format_rate,
    learning_rates,
    next_rate,
    parse_methods,
    split,
    with_fitting_ranks,
    with_learning_rates,
)
from weft.compare.plan.sweep import Sweep
from weft.compare.request import Budget, parse_budget

RATES = st.sampled_from(
    [float(f"{half}e{exponent}") for exponent in range(-6, 2) for half in (1, 3)]
)


def test_every_method_of_the_library_can_be_compared_and_has_rates() -> None:
    assert {entry.method for entry in parse_methods(",".join(DEFAULT))} <= set(weft.methods.METHODS)
    for cls in weft.methods.METHODS.values():
        rates = learning_rates(cls)
        assert len(rates) >= 3 and list(rates) == sorted(set(rates)), cls
    assert learning_rates(weft.Head) == (1e-2, 3e-2, 1e-1)
    assert [entry.lrs for entry in parse_methods("vera")] == [learning_rates(weft.VeRA)]


def test_fields_reach_the_configuration() -> None:
    lora, vera = parse_methods("LORA:r=4:alpha=8:init=kaiming,vera:d_init=1e-2")
    assert lora.config == weft.LoRA(r=4, alpha=8, init="kaiming")
    assert lora.label == "LoRA r=4 alpha=8 init=kaiming"
    assert vera.config == weft.VeRA(d_init=0.01)


def test_a_ratio_of_rates_belongs_to_the_row_and_not_to_the_method() -> None:
    plain, plus = parse_methods("dora:r=4,dora:r=4:lora_plus=16")
    assert plain.config == plus.config == weft.DoRA(r=4)
    assert (plain.lora_plus, plus.lora_plus) == (None, 16)
    assert plus.label == "DoRA r=4 lora_plus=16"
    sweep = Sweep([plain, plus], (), 1, 5, 2, 1e-2, {})
    specs = [sweep.spec(entry, 1e-3, 0, "final") for entry in (plain, plus)]
    keys = [spec.key({}) for spec in specs]
    assert keys[0] != keys[1]
    assert (
        keys[0] == "a5fb09a18c38e876"
    )  # of the version before the ratio: its runs are found again


def test_a_list_of_targets_stays_whole() -> None:
    query, mlp = parse_methods("lora:targets=['query','value']:r=2,dora:targets=mlp")
    assert query.config == weft.LoRA(targets=["query", "value"], r=2)
    assert mlp.config == weft.DoRA(targets="mlp")
    (bare,) = parse_methods("lora:exclude=[q_proj, mlp.up]:layers=[0,2]")
    assert bare.config == weft.LoRA(exclude=["q_proj", "mlp.up"], layers=[0, 2])
    (pattern,) = parse_methods("lora:targets=[01]|.*[qv]_proj")
    assert pattern.config == weft.LoRA(targets="[01]|.*[qv]_proj")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lroa", "'LoRA'"),
        ("lora,", "between two commas"),
        ("lora,lora", "appears twice"),
        ("lora:r", "name=value"),
        ("lora:rank=4", "no field 'rank'"),
        ("lora:r=0", "1 or more"),
        ("lora:lora_plus=0", "must be a number above 0"),
        ("lora:lora_plus=True", "must be a number above 0"),
        ("vera:lora_plus=4", "VeRA does not train both"),
        ("lora:seed=3", "set by weft compare"),
        ("lora:r=x", "whole number"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_the_reason(text: str, message: str) -> None:
    with pytest.raises(weft.ConfigError, match=message):
        parse_methods(text)


def test_the_head_and_the_run_s_seed_are_in_the_configuration_of_a_run() -> None:
    lora, bitfit = parse_methods("lora,bitfit")
    assert lora.with_head(("classifier",), 7) == weft.LoRA(modules_to_save=("classifier",), seed=7)
    assert bitfit.with_head(("classifier",), 7) == weft.BitFit(modules_to_save=("classifier",))


def test_given_rates_replace_the_grid_and_do_not_grow() -> None:
    entries = with_learning_rates(
        parse_methods("lora,lora:r=4,vera"), ["lora=3e-3,1e-3", "LoRA r=4=1"]
    )
    assert [(entry.lrs, entry.grows) for entry in entries] == [
        ((1e-3, 3e-3), False),
        ((1.0,), False),
        (learning_rates(weft.VeRA), True),
    ]


@pytest.mark.parametrize(
    "text", ["lora", "vera=1", "lora=", "lora=0", "lora=-1", "lora=x", "lora=inf", "lora=1,,2"]
)
def test_rates_that_cannot_be_meant_are_refused(text: str) -> None:
    with pytest.raises(weft.ConfigError, match="--lr"):
        with_learning_rates(parse_methods("lora"), [text])


def test_vera_s_default_rank_is_no_wider_than_the_narrowest_layer() -> None:
    entries, notes = with_fitting_ranks(parse_methods("vera,dvora,vera:r=200,lora"), 48)
    assert [getattr(entry.config, "r", None) for entry in entries] == [48, 48, 200, 8]
    assert len(notes) == 2
    same, none = with_fitting_ranks(parse_methods("vera,dvora"), 1000)
    assert (same, none) == (parse_methods("vera,dvora"), [])


@given(st.lists(RATES, min_size=1, max_size=5, unique=True))
def test_a_grid_grows_by_one_neighbour_beyond_the_edge_where_the_best_lies(
    lrs: list[float],
) -> None:
    low, high = min(lrs), max(lrs)
    below, above = next_rate(lrs, low), next_rate(lrs, high)
    assert below is not None
    assert 2.9 < low / below < 3.4
    if len(lrs) > 1:
        assert above is not None
        assert 2.9 < above / high < 3.4
    for inside in set(lrs) - {low, high}:
        assert next_rate(lrs, inside) is None


@given(st.floats(1e-9, 1e9))
def test_a_rate_is_printed_to_two_digits(value: float) -> None:
    assert math.isclose(float(format_rate(value)), value, rel_tol=0.06)
    assert len(format_rate(value)) <= 6


@given(st.lists(st.text("ab[]()", max_size=5), min_size=1, max_size=5))
def test_split_loses_nothing(parts: list[str]) -> None:
    assert ",".join(split(",".join(parts), ",")) == ",".join(parts)


def test_a_budget_has_defaults_for_what_is_not_said() -> None:
    assert parse_budget("steps=7,test=9") == Budget(steps=7, test=9)
    assert parse_budget("train=5").limits == {"train": 5, "validation": 1000, "test": 2000}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("step=7", "'steps'"),
        ("steps=2", "3 or more"),
        ("steps=1e3", "whole number"),
        ("batch=0", "1 or more"),
        ("steps=", "whole number"),
        ("parameters=0", "1 or more"),
        ("parameters=5k", "whole number"),
        ("seconds", "above 0"),
        ("seconds=0", "above 0"),
        ("seconds=inf", "above 0"),
        ("seconds=5,steps=9", "steps, parameters or seconds"),
        ("seconds=5,parameters", "steps, parameters or seconds"),
        ("second=5", "'seconds'"),
        ("steps=5,steps=6", "appears twice"),
        ("", "not known"),
    ],
)
def test_a_budget_that_cannot_be_meant_is_refused(text: str, message: str) -> None:
    with pytest.raises(weft.ConfigError, match=message):
        parse_budget(text)
