"""The plan: complete, within 80 columns, and what it counts is what is trained."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import weft
from support import VARIANTS, awake, config, net
from weft.model.plan import Plan, _folded, size_text
from weft.model.plan_entries import Frozen, Row

NAME = st.lists(
    st.from_regex(r"[a-z_]{1,14}|[0-9]{1,3}", fullmatch=True), min_size=1, max_size=9
).map(".".join)
SHAPE = st.lists(st.integers(1, 200_000), max_size=4).map(tuple)
ROW = st.builds(
    Row,
    NAME,
    st.sampled_from(["linear", "conv1d", "embedding", "tensor"]),
    SHAPE,
    st.integers(0, 10**12),
    st.integers(0, 10**13),
)
FROZEN = st.builds(
    Frozen,
    NAME,
    st.sampled_from(["linear", "convolution", "experts"]),
    SHAPE,
    st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), min_size=1, max_size=120),
)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_plan_counts_what_is_trained(variant):
    a = awake(variant)
    plan = a.adapter.plan()
    assert (
        plan.trainable == a.adapter.num_parameters == sum(p.numel() for p in a.adapter.parameters())
    )
    assert plan.nbytes == sum(p.numel() * p.element_size() for p in a.adapter.parameters())
    assert plan.base_parameters == sum(p.numel() for p in net(variant=variant).parameters())
    assert plan.method == type(a.config).__name__ and f"{plan.trainable:,} trained numbers" in str(
        plan
    )
    assert json.loads(json.dumps(plan.to_json()))["trainable"] == plan.trainable


def test_a_second_adapter_is_no_part_of_the_base():
    a = awake("LoRA")
    base = a.adapter.plan().base_parameters
    second = awake("DoRA", name="b", model=a.model)
    assert a.adapter.plan().base_parameters == second.adapter.plan().base_parameters == base


def test_repeated_layers_share_a_line_and_others_do_not():
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(
                nn.ModuleDict({"a": nn.Linear(4, 6), "b": nn.Linear(6, 4 + i // 11)})
                for i in range(12)
            )
            self.table = nn.Embedding(9, 4)

    lines = str(weft.attach(Deep(), config("LoRA", targets="all-linear")).plan()).splitlines()
    assert lines[0] == "LoRA: 723 trained numbers (97.83 % of 739), 2.824 KiB"
    assert [line.split()[:4] for line in lines[1:5]] == [
        ["layer", "kind", "shape", "x"],
        ["layers.{0..11}.a", "linear", "6x4", "12"],
        ["layers.{0..10}.b", "linear", "4x6", "11"],
        ["layers.11.b", "linear", "5x6", "1"],
    ]
    assert lines[5:] == [
        "stays frozen, 4.87 % of the weights (embedding 4.87 %):",
        "  table (embedding 4x9, x1): embedding",
    ]


@given(st.lists(ROW, max_size=12), st.lists(FROZEN, max_size=12), st.integers(0, 10**12))
def test_any_plan_fits_80_columns(rows, frozen, base):
    text = str(Plan("DVoRA", rows, frozen, base))
    assert max(map(len, text.splitlines())) <= 80
    assert all(line == line.rstrip() for line in text.splitlines())


@given(st.lists(ROW, max_size=12))
def test_folding_loses_no_layer(rows):
    groups = [group for _, group in _folded(rows)]
    assert sorted(map(id, rows)) == sorted(id(row) for group in groups for row in group)
    assert all(len({(row.kind, row.shape) for row in group}) == 1 for group in groups)


def test_sizes_have_four_digits_and_a_unit():
    assert [size_text(n) for n in (0, 1023, 1024, 1536, 3 * 2**20, 5 * 2**30, 2**43)] == [
        "0 B",
        "1023 B",
        "1 KiB",
        "1.5 KiB",
        "3 MiB",
        "5 GiB",
        "8192 GiB",
    ]


def test_a_plan_of_a_model_on_the_meta_device_needs_no_memory():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(100_000, 100_000), nn.Linear(100_000, 30))
    adapter = weft.attach(model, config("DVoRA", r=1000, targets="all-linear"))
    assert adapter.plan().trainable == 2 * 100_000 + 1000 + 2 * 30 + 1000
    assert all(p.is_meta for p in adapter.parameters())
