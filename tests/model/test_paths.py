"""Which way a layer is computed, and that it is said."""

import logging

import pytest
import torch
from torch import nn

import weft
from support import awake, check_close, reference_paths
from weft.model import fallback


class Own(nn.Linear):
    def forward(self, x):
        return super().forward(x)


def reason(a, x=None):
    return a.model.layer.weft["default"].fallback_reason(a.x if x is None else x)


@pytest.mark.parametrize("method", ["LoRA", "VeRA", "DoRA", "DVoRA", "LoRAFA", "AdaLoRA", "DyLoRA"])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_the_family_takes_the_fused_function(method, kind):
    assert reason(awake(method, kind)) is None


def test_what_takes_the_plain_definition_says_why(monkeypatch):
    a = awake("LoRA")
    assert "differ in dtype" in reason(a, a.x.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast" in reason(a)
    assert "no product of two thin matrices" in reason(awake("Bottleneck"))
    assert "forward of its own" in reason(awake("LoRA", "embedding"))
    a.model.layer.weight.requires_grad_(True)
    assert "trains too" in reason(a)
    with torch.no_grad():
        assert reason(a) is None
    reference_paths(monkeypatch, "1")
    assert "WEFT_REFERENCE=1" in reason(a)


def test_a_layer_with_a_forward_of_its_own_is_asked_for_its_output():
    model = nn.Sequential(Own(4, 4), nn.Linear(4, 4))
    adapter = weft.attach(model, weft.DoRA(r=2, targets=["0", "1"]))
    assert "Own has a forward of its own" in adapter.sites["0"].fallback_reason(torch.randn(2, 4))
    assert adapter.sites["1"].fallback_reason(torch.randn(2, 4)) is None


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning"
)  # torch's own forward mode still uses torch.jit
@pytest.mark.parametrize("method", ["LoRA", "DoRA", "VeRA"])
def test_transforms_of_functions_still_work(method):
    """Per-sample gradients and forward-mode derivatives go through the plain definition."""
    a = awake(method)
    names, values = zip(*a.model.named_parameters(), strict=True)

    def loss(values, x):
        return (
            torch.func.functional_call(a.model, dict(zip(names, values, strict=True)), (x,))
            .pow(2)
            .sum()
        )

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(values, a.x)
    a.run().pow(2).sum().backward()
    for name, parameter, rows in zip(names, a.model.parameters(), each, strict=True):
        if ".weft." in name:
            check_close(rows.sum(0), parameter.grad, torch.float32, name)
    _, tangent = torch.func.jvp(a.model, (a.x,), (torch.ones_like(a.x),))
    assert bool(tangent.abs().sum() > 0)


def test_the_log_says_it_once(caplog, monkeypatch):
    monkeypatch.setattr(fallback, "_noted", set())
    reference_paths(monkeypatch, "1")
    a = awake("LoRA")
    with caplog.at_level(logging.INFO, "weft.paths"):
        monkeypatch.setattr(fallback, "_noted", set())
        a.run()
        a.run()
    assert [r.getMessage() for r in caplog.records] == [
        "a layer is computed by its plain definition: WEFT_REFERENCE=1 asks for it"
    ]
