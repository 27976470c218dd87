"""The audit passes on a good run of every method and names what is wrong with each kind of bad
one.
"""

import pytest
import torch
from torch import nn

import weft
from support import (
    KINDS,
    RULE_VARIANTS,
    SELECTIONS,
    VARIANTS,
    awake,
    config,
    inputs,
    net,
    same_bits,
)


def train(model, x, parameters, steps=3, lr=1e-2, spoil=None, decay=0.0):
    optimiser = torch.optim.AdamW(list(parameters), lr=lr, weight_decay=decay)
    model.train()
    for _ in range(steps):
        optimiser.zero_grad()
        model(x).sub(1).pow(2).mean().backward()
        if spoil is not None:
            spoil()
        optimiser.step()


def fresh(variant="LoRA", kind="linear", **changes):
    model = net(kind, variant=variant)
    return model, inputs(kind), weft.attach(model, config(variant, **changes))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_good_run_passes(variant, kind):
    model, x, adapter = fresh(variant, kind)
    before = weft.snapshot(model)
    train(model, x, adapter.parameters())
    weft.audit(model, before, weft.snapshot(model))
    assert all(not p._post_accumulate_grad_hooks for p in adapter.parameters()), (
        "the audit must stop watching"
    )


@pytest.mark.parametrize(
    "variant", [v for v in RULE_VARIANTS if len(config(v).shapes(3, 3)) > 1 and "pissa" not in v]
)
def test_one_step_is_too_few_because_a_factor_starts_at_zero(variant):
    model, x, adapter = fresh(variant)
    before = weft.snapshot(model)
    train(model, x, adapter.parameters(), steps=1)
    with pytest.raises(weft.AuditError, match="its gradient was zero in all 1 backward passes"):
        weft.audit(model, before, weft.snapshot(model))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_tensor_that_is_not_in_the_optimiser(variant):
    model, x, adapter = fresh(variant)
    missing, *rest = adapter.named_parameters()
    before = weft.snapshot(model)
    train(model, x, [p for _, p in rest])
    with pytest.raises(weft.AuditError) as caught:
        weft.audit(model, before, weft.snapshot(model))
    assert str(caught.value).splitlines()[1:] == [
        (
            f"  {missing[0]}: it has a gradient but did not move (is it in the optimiser, and is the "
            "learning rate above 0?)"
        )
    ]


def test_a_learning_rate_of_zero():
    model, x, adapter = fresh()
    before = weft.snapshot(model)
    train(model, x, adapter.parameters(), lr=0.0)
    with pytest.raises(weft.AuditError, match=r"layer\.B: it has a gradient but did not move"):
        weft.audit(model, before, weft.snapshot(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("tensor", ["layer.weight", "mid.bias", "head.weight"])
def test_a_base_tensor_that_moved_by_one_bit(tensor, dtype):
    model, x, adapter = fresh("DoRA")
    model.to(dtype)
    before = weft.snapshot(model)
    train(model, x.to(dtype), adapter.parameters())
    with torch.no_grad():
        moved = model.get_parameter(tensor).view(-1).view(torch.uint8)
        moved[3 * model.layer.weight.element_size()] ^= 1
    with pytest.raises(weft.AuditError, match=rf"{tensor}: base tensor changed"):
        weft.audit(model, before, weft.snapshot(model))


def test_two_numbers_of_the_base_that_changed_places():
    model, x, adapter = fresh()
    before = weft.snapshot(model)
    train(model, x, adapter.parameters())
    with torch.no_grad():
        model.mid.weight[2] = model.mid.weight[2].flip(0).clone()
    with pytest.raises(weft.AuditError, match=r"mid\.weight: base tensor changed"):
        weft.audit(model, before, weft.snapshot(model))


@pytest.mark.parametrize("name", SELECTIONS)
def test_the_pretrained_value_behind_a_trained_copy_must_stay(name):
    model, x, adapter = fresh(name)
    before = weft.snapshot(model)
    train(model, x, adapter.parameters())
    key, selected = next(iter(adapter.selected_tensors.items()))
    with torch.no_grad():
        selected.original.add_(1e-3)
    with pytest.raises(weft.AuditError, match=rf"{key}: base tensor changed"):
        weft.audit(model, before, weft.snapshot(model))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite(value):
    model, x, adapter = fresh()
    before = weft.snapshot(model)
    adapter.sites["mid"].A.register_hook(lambda g: g.index_fill(0, torch.tensor([1]), value))
    train(
        model,
        x,
        adapter.parameters(),
        spoil=lambda: adapter.sites["mid"].A.grad.nan_to_num_(0, 0, 0),
    )
    with pytest.raises(
        weft.AuditError, match=r"mid\.A: its gradient was NaN or infinite"
    ) as caught:
        weft.audit(model, before, weft.snapshot(model))
    assert "layer.A" not in str(caught.value)


def test_a_tensor_that_became_nan():
    model, x, adapter = fresh()
    before = weft.snapshot(model)
    train(model, x, adapter.parameters())
    with torch.no_grad():
        adapter.sites["layer"].B[0, 0] = float("nan")
    with pytest.raises(weft.AuditError, match=r"layer\.B: holds NaN or infinity"):
        weft.audit(model, before, weft.snapshot(model))


class Skips(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.unused, self.head = nn.Linear(7, 9), nn.Linear(7, 9), nn.Linear(9, 5)

    def forward(self, x):
        return self.head(torch.tanh(self.layer(x)))


def test_a_layer_that_is_never_called_even_if_weight_decay_moves_it():
    model = Skips()
    adapter = weft.attach(model, config("DoRA", targets=["layer", "unused"]))
    for p in adapter.parameters():
        p.grad = torch.zeros_like(p)  # as zero_grad(set_to_none=False) leaves it
    before = weft.snapshot(model)
    optimiser = torch.optim.AdamW(adapter.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(3):
        optimiser.zero_grad(set_to_none=False)
        model(inputs("linear")).pow(2).mean().backward()
        optimiser.step()
    with pytest.raises(weft.AuditError) as caught:
        weft.audit(model, before, weft.snapshot(model))
    *lines, last = str(caught.value).splitlines()[1:]
    assert len(lines) == 3 and all(
        "unused." in line and "no gradient reached it" in line for line in lines
    )
    assert (
        "Gradients reached unused never, or more rarely" in last
        and "audit: {unreached: allow}" in last
    )


class Unreached(nn.Module):
    """A layer that is not called, one whose output nobody reads, one that gets no rows."""

    def __init__(self):
        super().__init__()
        self.layer, self.skipped = nn.Linear(7, 5), nn.Linear(7, 5)
        self.pooler, self.expert = nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, x):
        y = self.layer(x)
        self.pooler(y)
        return torch.cat([y.flatten(0, -2), self.expert(y.flatten(0, -2)[:0])])


LEFT = ["skipped", "pooler", "expert"]


@pytest.mark.parametrize("variant", ["LoRA", "DoRA", "VeRA", "Full", "Bottleneck"])
def test_layers_that_no_gradient_reaches_can_be_allowed(variant):
    model = Unreached()
    adapter = weft.attach(model, config(variant, targets="all-linear"))
    before = weft.snapshot(model)
    train(model, inputs("linear"), adapter.parameters())
    after = weft.snapshot(model)
    with pytest.raises(weft.AuditError, match="Gradients reached skipped, pooler, expert never"):
        weft.audit(model, before, after)
    assert weft.audit(model, before, after, unreached="allow") == LEFT
    with pytest.raises(weft.ConfigError, match=r"unreached='no'.*'allow'"):
        weft.audit(model, before, after, unreached="no")


def test_an_allowed_layer_excuses_no_other_fault():
    model = Unreached()
    adapter = weft.attach(model, config("LoRA", targets="all-linear"))
    before = weft.snapshot(model)
    spoiled = [p for name, p in adapter.named_parameters() if name != "layer.A"]
    train(model, inputs("linear"), spoiled)
    with torch.no_grad():
        model.skipped.weight.add_(1)
    with pytest.raises(weft.AuditError) as caught:
        weft.audit(model, before, weft.snapshot(model), unreached="allow")
    lines = str(caught.value).splitlines()[1:]
    assert len(lines) == 2 and "layer.A: it has a gradient but did not move" in lines[0]
    assert "skipped.weight: base tensor changed" in lines[1]


def test_a_layer_that_is_skipped_in_some_steps():
    """Its B has moved, and its A has had one gradient, which is 0 as long as B is."""
    model = net()
    adapter = weft.attach(model, config("LoRA"))
    calls = []
    layer = type(model.mid).forward

    def dropped(module, x):
        calls.append(1)
        return layer(module, x) if len(calls) == 1 else x[..., :9]

    model.mid.forward = dropped.__get__(model.mid)
    before = weft.snapshot(model)
    train(model, inputs("linear"), adapter.parameters())
    after = weft.snapshot(model)
    with pytest.raises(weft.AuditError, match="Gradients reached mid never, or more rarely"):
        weft.audit(model, before, after)
    assert weft.audit(model, before, after, unreached="allow") == ["mid"]


def test_a_gradient_that_is_not_finite_is_never_allowed():
    model = Unreached()
    adapter = weft.attach(model, config("LoRA", targets="all-linear"))
    before = weft.snapshot(model)
    for p in adapter.layers["skipped"].parameters():
        (p.sum() * float("nan")).backward()
    train(model, inputs("linear"), adapter.parameters())
    with pytest.raises(weft.AuditError, match=r"skipped\.A: its gradient was NaN"):
        weft.audit(model, before, weft.snapshot(model), unreached="allow")


def test_an_adapter_that_nothing_reaches_is_never_allowed():
    model = Unreached()
    adapter = weft.attach(model, config("LoRA", targets=["skipped", "pooler"]))
    before = weft.snapshot(model)
    train(model, inputs("linear").requires_grad_(), adapter.parameters())
    with pytest.raises(weft.AuditError, match=r"skipped\.A: no gradient reached it"):
        weft.audit(model, before, weft.snapshot(model), unreached="allow")


def test_an_adapter_that_is_not_active():
    model, x, _ = fresh()
    weft.attach(model, config("DVoRA"), name="b")
    before = weft.snapshot(model, "default")
    train(model, x, weft.adapters(model)["b"].parameters())
    with pytest.raises(
        weft.AuditError, match=r"layer\.A: no gradient reached it .*is the adapter the active one"
    ):
        weft.audit(model, before, weft.snapshot(model, "default"))


def test_all_adapters_or_one_of_them():
    model, x, _ = fresh()
    other = weft.attach(model, config("DVoRA"), name="b")
    before, only = weft.snapshot(model), weft.snapshot(model, "b")
    train(model, x, other.parameters())
    weft.audit(model, only, weft.snapshot(model, "b"))
    with pytest.raises(weft.AuditError, match=r"default: layer\.A: no gradient reached it"):
        weft.audit(model, before, weft.snapshot(model))
    with pytest.raises(weft.WeftError, match="no adapter is named 'c'"):
        weft.snapshot(model, "c")


def test_batch_statistics_that_move_are_named_with_the_remedy():
    model = nn.Sequential(nn.Linear(7, 9), nn.BatchNorm1d(9), nn.Linear(9, 5))
    adapter = weft.attach(model, config("LoRA", targets=["0", "2"]))
    x = torch.randn(8, 7)
    before = weft.snapshot(model)
    train(model, x, adapter.parameters())
    with pytest.raises(
        weft.AuditError,
        match=r"1\.running_mean: base tensor changed \(put BatchNorm layers .* eval",
    ):
        weft.audit(model, before, weft.snapshot(model))


def test_many_problems_are_cut_and_counted():
    model = nn.Sequential(*(nn.Linear(7, 7) for _ in range(20)))
    weft.attach(model, config("LoRA", targets="all-linear"))
    with pytest.raises(weft.AuditError) as caught:
        weft.audit(model, weft.snapshot(model), weft.snapshot(model))
    assert len(str(caught.value).splitlines()) == 12 and str(caught.value).endswith(
        "... and 30 more"
    )


def test_a_snapshot_changes_nothing():
    a = awake("Full")
    output, state = a.run(), {k: v.clone() for k, v in a.model.state_dict().items()}
    weft.snapshot(a.model)
    assert same_bits(a.run(), output) and all(
        same_bits(v, state[k]) for k, v in a.model.state_dict().items()
    )


def copies(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def test_two_mappings_are_judged_by_what_grad_holds_now():
    model, x, adapter = fresh()
    before = copies(model)
    train(model, x, adapter.parameters())
    weft.audit(model, before, copies(model))
    after = copies(model)
    after["head.bias"][2] += 1e-4
    del after["layer.weft.default.A"]
    with pytest.raises(weft.AuditError) as caught:
        weft.audit(model, before, after)
    assert "layer.weft.default.A: not in both mappings" in str(caught.value)
    assert "head.bias: base tensor changed" in str(caught.value)
    with pytest.raises(weft.AuditError, match=r"must be from weft\.snapshot"):
        weft.audit(model, before, 3)


def test_a_base_that_holds_nan_has_not_changed():
    model, x, adapter = fresh(targets=["layer"])
    model.register_buffer("unused", torch.tensor([float("nan"), -0.0]))
    before, shot = copies(model), weft.snapshot(model)
    train(model, x, adapter.parameters())
    weft.audit(model, before, copies(model))
    weft.audit(model, shot, weft.snapshot(model))
    changed = copies(model)
    changed["unused"] = torch.tensor([float("nan"), 0.0])
    with pytest.raises(weft.AuditError, match="unused: base tensor changed"):
        weft.audit(model, before, changed)


def test_without_an_adapter_there_is_nothing_to_audit():
    with pytest.raises(weft.WeftError, match="Net carries no adapter"):
        weft.snapshot(net())


@pytest.mark.parametrize("form", ["snapshots", "mappings"])
def test_a_layer_that_has_lost_its_last_triplet_is_not_asked_to_move(form):
    """Its lam is 0, as at the start. A layer that has one left is asked as before."""

    def picture():
        return (
            weft.snapshot(model)
            if form == "snapshots"
            else {k: v.clone() for k, v in model.state_dict().items()}
        )

    model, _, adapter = fresh(
        "AdaLoRA", r=4, target_r=1, total_steps=4, warm_up=1, final=1, interval=1
    )
    optimiser = torch.optim.AdamW(adapter.parameters(), lr=0.05)
    for trained in ("mid", None):
        before = picture()
        for _ in range(4):
            optimiser.zero_grad()
            x = inputs("linear")
            (model(x) if trained is None else model.mid(torch.tanh(model.layer(x).detach()))).pow(
                2
            ).sum().backward()
            optimiser.step()
        assert adapter.ranks == {"layer": 0, "mid": 2}
        if trained is None:
            weft.audit(model, before, picture())
    before = picture()
    optimiser = torch.optim.SGD([adapter.sites["mid"].lam], lr=0.1)
    for _ in range(2):
        for p in adapter.parameters():
            p.grad = None
        model(inputs("linear")).pow(2).sum().backward()
        optimiser.step()
    with pytest.raises(weft.AuditError) as caught:
        weft.audit(model, before, picture())
    assert sorted(line.split(":")[0].strip() for line in str(caught.value).splitlines()[1:]) == [
        "mid.P",
        "mid.Q",
    ]
