"""Models that write to a layer's output in place train as they did without an adapter."""

import pytest
import torch
from torch import nn

import weft
from support import METHODS, RULES, check_close, config, reference_paths

FUSED = [name for name in RULES if hasattr(METHODS[name], "factors")]


class Written(nn.Module):
    """An addition in place behind the layer, and no module that would tell."""

    def __init__(self):
        super().__init__()
        self.layer, self.mid = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        y = self.layer(x)
        y += 1
        return self.mid(y)


def told():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 3))
    named = nn.Module()
    named.layer, named.act, named.mid = model
    named.forward = lambda x: named.mid(named.act(named.layer(x)))
    return named


def gradients(model, adapter, x):
    out = model(x)
    out += 1
    return torch.autograd.grad(out.pow(2).sum(), [x, *adapter.parameters()])


def awake(model, name):
    adapter = weft.attach(model, config(name))
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return adapter


@pytest.mark.parametrize("shape", [(4, 6), (2, 5, 6)], ids=["rows", "tokens"])
@pytest.mark.parametrize("name", FUSED)
def test_a_module_that_works_in_place(name, shape, monkeypatch):
    torch.manual_seed(0)
    model, x = told(), torch.randn(*shape, requires_grad=True)
    adapter = awake(model, name)
    ours = gradients(model, adapter, x)
    reference_paths(monkeypatch, "1")
    for found, wanted in zip(ours, gradients(model, adapter, x), strict=True):
        check_close(found, wanted, torch.float32)


@pytest.mark.parametrize("name", FUSED)
def test_an_operation_in_place_is_right_or_refused_with_the_cure(name, monkeypatch):
    torch.manual_seed(0)
    model, x = Written(), torch.randn(4, 6, requires_grad=True)
    adapter = awake(model, name)
    if hasattr(METHODS[name], "wrap"):
        with pytest.raises(RuntimeError, match="WEFT_REFERENCE=1"):
            gradients(model, adapter, x)
        return
    ours = gradients(model, adapter, x)
    reference_paths(monkeypatch, "1")
    for found, wanted in zip(ours, gradients(model, adapter, x), strict=True):
        check_close(found, wanted, torch.float32)
