"""delta M and delta D: their definition row by row, what moves only one of them, and what an
adapter moves.
"""

import math

import pytest
import torch

import support
import weft
from weft.analysis import change
from weft.analysis.changes import changes_of
from weft.errors import UnsupportedError


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_definition(W, changed):
    """The formulas, a row and a number at a time."""
    m = d = 0.0
    for a, b in zip(W.tolist(), changed.tolist(), strict=True):
        na, nb = math.sqrt(sum(x * x for x in a)), math.sqrt(sum(x * x for x in b))
        m += abs(nb - na)
        d += 1 - sum(x * y for x, y in zip(a, b, strict=True)) / (na * nb)
    return m / len(W), d / len(W)


@pytest.mark.parametrize("size", [1e-4, 0.3, 5.0])
def test_both_are_what_the_equations_say(size):
    W = random(6, 9)
    changed = W + size * random(6, 9, seed=1)
    found, (m, d) = change(W, changed), by_definition(W, changed)
    assert found.delta_m == pytest.approx(m, rel=1e-11)
    assert found.delta_d == pytest.approx(d, rel=1e-6 if size < 1e-3 else 1e-11)
    assert found.delta_m > 0 and found.delta_d > 0 and found.undirected == 0


def test_a_rescale_of_the_rows_turns_nothing():
    W = random(6, 9)
    scale = torch.tensor([0.5, 2, 1.5, 3, 0.1, 7], dtype=torch.float64)
    found = change(W, scale[:, None] * W)
    assert found.delta_d < 1e-30
    assert found.delta_m == pytest.approx(
        float(((scale - 1).abs() * W.norm(dim=1)).mean()), rel=1e-12
    )


def test_a_rotation_changes_no_length():
    W = random(6, 9)
    Q = torch.linalg.qr(random(9, 9, seed=2)).Q
    found = change(W, W @ Q)
    assert found.delta_m < 1e-14 and found.delta_d > 0.1
    back = change(W, -W)
    assert back.delta_m == 0 and back.delta_d == pytest.approx(2, rel=1e-12)


def test_it_is_rows_that_count_and_opposite_signs_do_not_cancel():
    W = torch.eye(2, 3, dtype=torch.float64)
    longer_and_shorter = torch.tensor([[1.5, 0, 0], [0, 0.5, 0]], dtype=torch.float64)
    assert change(W, longer_and_shorter).delta_m == 0.5
    columns_scaled = W * torch.tensor([2.0, 1, 1])
    assert change(W, columns_scaled).delta_m == 0.5 and change(
        W.t(), columns_scaled.t()
    ).delta_m == pytest.approx(1 / 3)


def test_a_row_without_direction_counts_in_magnitude_alone():
    W = random(3, 4)
    W[1] = 0
    changed = W.clone()
    changed[1, 2] = 3.0
    found = change(W, changed)
    assert (found.delta_m, found.delta_d, found.undirected) == (1.0, 0.0, 1)
    with pytest.raises(ValueError, match="the same shape"):
        change(W, W.t())


def test_a_tiny_turn_keeps_its_digits():
    """1 - cos computed as such would be 0 or a multiple of 1e-16."""
    angle = 1e-7
    turned = torch.tensor([[math.cos(angle), math.sin(angle)]], dtype=torch.float64)
    assert change(torch.tensor([[1.0, 0.0]]), turned).delta_d == pytest.approx(
        angle**2 / 2, rel=1e-6
    )


@pytest.mark.parametrize("kind", support.KINDS)
@pytest.mark.parametrize("variant", support.TURNS_WEIGHTS)
def test_every_rule_is_measured_by_its_effective_weight(variant, kind):
    a = support.awake(variant, kind)
    found = dict(changes_of(a.adapter))
    assert list(found) == ["layer", "mid"]
    declared = a.declared()
    for module, measured in found.items():
        with torch.no_grad():
            W, changed = (
                support.base_weight(a, module, {}),
                support.oracle_weight(a, module, declared),
            )
        wanted = by_definition(W, changed)
        assert (measured.delta_m, measured.delta_d) == pytest.approx(wanted, rel=1e-6), module


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_full_fine_tuning_is_measured_by_its_copies_without_the_head(kind):
    a = support.awake("Full", kind)
    found, declared = dict(changes_of(a.adapter)), a.declared()
    assert list(found) == ["layer", "mid"]  # neither biases nor the head
    for module, measured in found.items():
        with torch.no_grad():
            wanted = by_definition(
                support.base_weight(a, module, {}), support.base_weight(a, module, declared)
            )
        assert (measured.delta_m, measured.delta_d) == pytest.approx(wanted, rel=1e-9)


def test_dora_whose_magnitude_alone_has_moved_turns_nothing():
    model = support.net()
    adapter = weft.attach(model, weft.DoRA(r=2, targets=["layer", "mid"]))
    with torch.no_grad():
        for name, p in adapter.named_parameters():
            if name.endswith(".m"):
                p.mul_(1.25)
    for found in dict(changes_of(adapter)).values():
        assert found.delta_d < 1e-14 and found.delta_m > 0.01


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (weft.BitFit(), "BitFit trains no weight matrix"),
        (weft.Bottleneck(r=2, targets=["mid"]), "Bottleneck does not change weights"),
    ],
)
def test_what_has_neither_is_refused_by_name(config, said):
    adapter = weft.attach(support.net(), config)
    with pytest.raises(UnsupportedError, match=said):
        dict(changes_of(adapter))
