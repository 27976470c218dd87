"""`weft.parameter_groups`: every trained tensor is in one group, at the rate that was asked for."""

import pytest
import torch
from test_targets import Plain
from torch import nn

import weft
from support import VARIANTS, awake, config, net
from weft.compare.tasks import loop


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_trained_tensor_is_in_one_group(variant):
    adapter = awake(variant).adapter
    groups = weft.parameter_groups(adapter, 1e-3, weight_decay=0.1)
    found = [id(p) for group in groups for p in group["params"]]
    assert sorted(found) == sorted(map(id, adapter.parameters()))
    assert all(p.ndim >= 2 for g in groups if g["weight_decay"] for p in g["params"])


@pytest.mark.parametrize("method", ["LoRA", "DoRA", "DyLoRA"])
def test_lora_plus_moves_b_by_a_multiple(method):
    """A step of SGD from equal gradients: B moves 16 times as far, and nothing else does."""
    adapter = weft.attach(net(), config(method, modules_to_save=["head"]))
    groups = weft.parameter_groups(adapter, 0.25, lora_plus=16, head_lr=0.5)
    before = {name: p.detach().clone() for name, p in adapter.named_parameters()}
    for p in adapter.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.SGD([{k: g[k] for k in ("params", "lr")} for g in groups], lr=1.0).step()
    for name, p in adapter.named_parameters():
        last = name.rpartition(".")[2]
        rate = 0.5 if name.startswith("head") else 4.0 if last == "B" else 0.25
        torch.testing.assert_close(before[name] - p, torch.full_like(p, rate))


def test_an_embedding_keeps_its_rate():
    """A of an embedding is what starts at 0, so the ratio would be upside down there."""
    adapter = weft.attach(Plain(), weft.LoRA(r=2, targets=["embed", "up"]))
    rates = {
        id(p): g["lr"]
        for g in weft.parameter_groups(adapter, 1.0, lora_plus=8)
        for p in g["params"]
    }
    assert rates[id(adapter.layers["embed"].B)] == rates[id(adapter.layers["embed"].A)] == 1.0
    assert rates[id(adapter.layers["blocks.0.up"].B)] == 8.0


@pytest.mark.parametrize(
    ("method", "options", "says"),
    [
        ("LoRA", {"lora_plus": 0}, "lora_plus=0"),
        ("LoRA", {"lora_plus": True}, "lora_plus=True"),
        ("LoRA", {"lora_plus": float("nan")}, "write a number above 0"),
        ("VeRA", {"lora_plus": 4}, "VeRA does not train both. It trains d, b."),
        ("BitFit", {"lora_plus": 4}, "no tensors of its own"),
        ("LoRA", {"lora_plus": 4, "lr_factors": {"B": 2}}, "give one of them"),
        ("LoRA", {"lr_factors": {"C": 2}}, "LoRA trains no tensor of that name. It trains A, B"),
        ("LoRA", {"head_lr": 1e-3}, "no head is trained"),
        ("LoRA", {"weight_decay": -1}, "weight_decay=-1"),
    ],
    ids=str,
)
def test_an_option_without_effect_is_an_error(method, options, says):
    adapter = weft.attach(net(), config(method))
    with pytest.raises(weft.ConfigError, match=says):
        weft.parameter_groups(adapter, 1e-3, **options)


def test_compare_trains_a_row_with_its_ratio():
    adapter = weft.attach(net(), config("LoRA"))
    groups = loop.groups(adapter, loop.Recipe(lr=1e-3, lora_plus=4.0))
    assert {g["name"]: g["lr"] for g in groups} == {"adapter": 1e-3, "B": 4e-3}


def test_an_adapter_that_trains_a_head_alone_takes_the_rate_of_the_row():
    model = nn.ModuleDict({"layer": nn.Linear(3, 3), "head": nn.Linear(3, 2)})
    adapter = weft.attach(model, weft.Head(modules_to_save=["head"]))
    (rate,) = {g["lr"] for g in loop.groups(adapter, loop.Recipe(lr=1e-3, head_lr=0.5))}
    assert rate == 1e-3
