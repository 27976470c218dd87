"""Layers that read the same input compute VeRA's A x once, forward and backward, and never a stale
one.
"""

import gc
import weakref

import pytest
import torch
from torch import nn

import weft
from support import check_close, reference_paths, set_way
from weft.ops import cache, plan


@pytest.fixture(autouse=True)
def _large(monkeypatch):
    """Small work shares nothing: one product is cheaper than looking for another."""
    set_way(monkeypatch, "fused")


class Three(nn.Module):
    """q, k and v read one tensor, o another."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x, between=lambda x: None):
        q = self.q(x)
        between(x)
        return self.o(torch.tanh(q) + self.k(x) * torch.tanh(self.v(x)))


def adapted(method=weft.VeRA, **fields):
    torch.manual_seed(0)
    model = Three()
    adapter = weft.attach(model, method(r=4, targets=["q", "k", "v", "o"], **fields))
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn_like(p))
    return model, adapter


def gradients(model, adapter, x):
    out = model(x)
    return [out.detach(), *torch.autograd.grad(out.pow(2).sum(), [x, *adapter.parameters()])]


@pytest.mark.parametrize("method", [weft.VeRA, weft.DVoRA])
def test_one_input_may_be_trained_on_twice(method):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 6)), torch.randn(5, 6, requires_grad=True)
    adapter = weft.attach(model, method(r=4, targets=["0"]))
    for p in adapter.parameters():
        nn.init.normal_(p)
    once, twice = gradients(model, adapter, x), gradients(model, adapter, x)
    assert all(map(torch.equal, once, twice))


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("method", [weft.VeRA, weft.DVoRA])
def test_one_product_for_three_readers(method, back, monkeypatch):
    monkeypatch.setattr(plan, "build_backward", lambda *a: back)
    model, adapter = adapted(method)
    x = torch.randn(5, 6, requires_grad=True)
    cache.counts.clear()
    ours = gradients(model, adapter, x)
    assert cache.counts["A x"] == 2
    reference_paths(monkeypatch, "1")
    for found, wanted in zip(ours, gradients(model, adapter, x), strict=True):
        check_close(found, wanted, torch.float32)


def test_an_input_that_is_written_to_is_read_again(monkeypatch):
    model, _ = adapted()
    with torch.no_grad():
        x = torch.randn(5, 6)
        found = model(x.clone(), between=lambda x: x.mul_(2))
        reference_paths(monkeypatch, "1")
        check_close(found, model(x.clone(), between=lambda x: x.mul_(2)), torch.float32)


def test_another_tensor_at_the_same_place_is_another_input():
    model, _ = adapted()
    with torch.no_grad():
        outputs = [
            model(torch.full((5, 6), float(i))) for i in range(20)
        ]  # all at one address, one by one
        for i, out in enumerate(outputs):
            x = torch.full((5, 6), float(i))
            assert torch.equal(out, model(x))


def test_gradients_are_not_lost_to_a_product_made_without_them():
    model, _ = adapted()
    x = torch.randn(5, 6, requires_grad=True)
    with torch.no_grad():
        model.q(x)
    out = model.k(x)
    with torch.no_grad():
        model.v(x)
    assert torch.autograd.grad(out.sum(), x)[0].abs().sum() > 0


@pytest.mark.parametrize("grad", [False, True])
def test_nothing_is_held_beyond_the_input(grad):
    model, _ = adapted()
    seen = []

    def look(x):
        seen.append(weakref.ref(model.q.weft["default"].shared.down._last[3]))

    # A leaf is held by its own graph, until the next input.
    x = 1 * torch.randn(5, 6, requires_grad=True)
    with torch.set_grad_enabled(grad):
        out = model(x, between=look)
    shared = model.q.weft["default"].shared
    del out, x
    gc.collect()
    assert shared.down._last is None and seen[0]() is None


def test_dropout_draws_for_each_layer():
    model, _ = adapted(dropout=0.5)
    cache.counts.clear()
    model(torch.randn(5, 6))
    assert cache.counts["A x"] == 0
