"""Layers with a forward of their own are tried when they are attached; parametrised ones are adapted."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import bases_record
import weft
from support import TURNS_WEIGHTS, config, distance, move, same_bits


class Plain(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias)


class Centred(nn.Linear):
    """W (x - mean x) + bias: the same for inputs without a mean."""

    def forward(self, x):
        return super().forward(x - x.mean(-1, keepdim=True))


class Detached(nn.Linear):
    def forward(self, x):
        return super().forward(x.detach())


class NoGrad(nn.Linear):
    def forward(self, x):
        with torch.no_grad():
            return super().forward(x)


class Straight(nn.Linear):
    """The right output, and half of the gradient."""

    def forward(self, x):
        y = super().forward(x)
        return y / 2 + (y / 2).detach()


class Bigger(nn.Embedding):
    def forward(self, x):
        return 2 * super().forward(x)


FAULTS = [
    (Centred, "computes something else than a plain linear layer"),
    (Detached, "gives its input no gradient"),
    (NoGrad, "gives its input no gradient"),
    (Straight, "the gradient that Straight gives its input is not that of W x"),
]


@pytest.mark.parametrize(("cls", "words"), FAULTS)
def test_a_class_that_is_no_linear_map_is_refused_by_name(cls, words):
    model = nn.Sequential(nn.Linear(7, 7), cls(7, 5), Plain(5, 5))
    with pytest.raises(weft.TargetError, match=f"'1' .*{words}"):
        weft.attach(model, weft.LoRA(targets=["1"]))
    adapter = weft.attach(model, weft.LoRA(r=2))
    assert list(adapter.layers) == ["0", "2"]
    assert words in {f.name: f.reason for f in adapter.frozen}["1"]
    assert torch.is_grad_enabled() and model[1].weight.grad is None


def test_a_forward_on_the_instance_is_tried_too():
    def patched(forward):
        model = nn.ModuleDict({"a": nn.Linear(7, 5), "e": nn.Embedding(4, 7)})
        own = model["a"].forward
        model["a"].forward = lambda x: forward(own, x)
        return model

    weft.attach(patched(lambda own, x: own(x)), weft.LoRA(targets=["a"]))
    for forward in (lambda own, x: own(x) * 2, lambda own, x: own(x.detach())):
        with pytest.raises(weft.TargetError, match=r"'a' .*the forward of Linear"):
            weft.attach(patched(forward), weft.LoRA(targets=["a"]))
    with pytest.raises(weft.TargetError, match="the forward of Bigger computes something else"):
        weft.attach(nn.ModuleDict({"e": Bigger(4, 5)}), weft.LoRA(targets=["e"]))


def test_without_gradients_and_in_inference_mode_the_same_is_found():
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            model = nn.Sequential(nn.Linear(7, 5), Plain(5, 5))
            assert len(weft.attach(model, weft.LoRA(r=2)).layers) == 2
    with torch.no_grad(), pytest.raises(weft.TargetError, match="no gradient"):
        weft.attach(nn.Sequential(Detached(7, 5)), weft.LoRA(targets=["0"]))


MADE = {
    "weight norm": parametrizations.weight_norm,
    "orthogonal": parametrizations.orthogonal,
    "spectral norm": parametrizations.spectral_norm,
}


def parametrised(made):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    MADE[made](model[0])
    return model.requires_grad_(False).eval()


X = torch.randn(3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "variant", [v for v in TURNS_WEIGHTS if "rslora" not in v and "pissa" not in v]
)
@pytest.mark.parametrize("made", MADE)
def test_a_parametrised_layer_computes_with_the_weight_that_is_made(made, variant, tmp_path):
    model, dense = parametrised(made), parametrised(made)
    weight, bias = dense[0].weight.detach(), dense[0].bias
    dense[0] = nn.Linear(7, 5).double().requires_grad_(False)
    dense[0].weight.copy_(weight), dense[0].bias.copy_(bias)
    given = config(variant, targets=["0"], r=2, dtype="float64")
    adapter, other = weft.attach(model, given), weft.attach(dense, given)
    assert distance(model(X), dense(X)) < 1e-14
    for each in (adapter, other):
        move(each)
    found, wanted = model(X), dense(X)
    assert distance(found, wanted) < 1e-14
    for y in (found, wanted):
        y.square().sum().backward()
    for p, q in zip(adapter.parameters(), other.parameters(), strict=True):
        assert p.grad is None if q.grad is None else distance(p.grad, q.grad) < 1e-12
    weft.save(model, tmp_path)
    weft.load(fresh := parametrised(made), tmp_path)
    assert same_bits(fresh(X), model(X)) and same_bits(copy.deepcopy(model)(X), model(X))
    with pytest.raises(weft.MergeError, match=r"'0': its weight is parametrised, so W' cannot be"):
        weft.merge(model)
    if ":" not in variant:
        bases_record.exact("parametrised nn.Linear", variant)
        bases_record.refused("parametrised nn.Linear", "merge", "its weight is parametrised")


@pytest.mark.parametrize("made", MADE)
def test_attaching_leaves_a_parametrisation_as_it_is(made):
    model = parametrised(made).train()
    before = {k: t.clone() for k, t in model.state_dict().items()}
    adapter = weft.attach(model, weft.DoRA(r=2, dtype="float64"))
    assert list(adapter.layers) == ["0", "2"]
    assert "parametrizations" not in str(adapter.plan())
    assert all(same_bits(t, model.state_dict()[k]) for k, t in before.items())
    weft.detach(model)
    assert list(model.state_dict()) == list(before)
    # A step of spectral norm's iteration per forward, as without an adapter.
    twin = copy.deepcopy(model)
    weft.attach(model, weft.LoRA(r=2, dtype="float64"))
    assert same_bits(model(X), twin(X))
    assert all(same_bits(t, model.state_dict()[k]) for k, t in twin.state_dict().items())


def test_a_parametrisation_that_draws_another_weight_each_time_is_refused():
    class Noise(nn.Module):
        def forward(self, W):
            return W + torch.randn_like(W) if self.training else W

    model = nn.Sequential(nn.Linear(7, 5)).train()
    parametrize.register_parametrization(model[0], "weight", Noise())
    with pytest.raises(weft.TargetError, match="its forward is not W x"):
        weft.attach(model, weft.LoRA(targets=["0"]))
