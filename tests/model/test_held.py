"""Weights that a module reads itself: W' stands in their place, for every method that changes weights."""

import copy
import pickle
import threading

import held_models
import pytest
import torch
from held_models import CASES, built, definition, inputs, parameter_of
from torch import nn

import bases_record
import weft
from support import TURNS_WEIGHTS, config, distance, move, same_bits

EXACT = 5e-16
BASES = {  # in docs/bases.md
    "attention": "nn.MultiheadAttention",
    "LSTM": "nn.LSTM",
    "GRU": "nn.GRU",
    "RNN": "nn.RNN",
    "cells": "nn.LSTMCell, nn.GRUCell",
    "Bilinear": "nn.Bilinear",
    "a user's own": "a module's own matrix",
}
METHODS = [v for v in TURNS_WEIGHTS if "pissa" not in v and "rslora" not in v]


def gap(found, wanted):
    return float(((found - wanted).abs().max() / wanted.abs().max()).detach())


def moved(case, variant="LoRA", dtype=torch.float64, **changes):
    model = built(case, dtype)
    base = copy.deepcopy(model)
    given = {"targets": CASES[case][1], "dtype": str(dtype).removeprefix("torch."), "r": 2}
    adapter = weft.attach(model, config(variant, **{**given, **changes}))
    with torch.no_grad():
        assert same_bits(model(inputs(dtype)), base(inputs(dtype)))
    move(adapter)
    return model, base, adapter


def weights_of(model, adapter):
    found = {}
    for name, layer in adapter.layers.items():
        tensor = layer.base.slot
        found[name] = weft.effective_weight(layer.base.host, tensor=tensor)
    return found


@pytest.mark.parametrize("variant", METHODS)
@pytest.mark.parametrize("case", CASES)
def test_the_output_and_all_gradients_are_those_of_the_definition(case, variant):
    model, base, adapter = moved(case, variant)
    x = inputs().requires_grad_()
    other = inputs().requires_grad_()
    found = model(x)
    wanted, changed, leaves = definition(base, adapter, other)
    for name, W in weights_of(model, adapter).items():
        assert gap(W, changed[name]) <= EXACT
    assert gap(found, wanted) <= 4 * EXACT < gap(found, base(other)) / 1e9
    found.square().sum().backward()
    wanted.square().sum().backward()
    assert gap(x.grad, other.grad) <= 20 * EXACT
    # A gradient of d is the difference of far larger numbers.
    largest = max(float(t.grad.abs().max()) for t in leaves.values() if t.grad is not None)
    for name, p in adapter.named_parameters():
        if leaves[name].grad is None or not p.requires_grad:
            assert p.grad is None or not p.requires_grad, name
        else:
            assert float((p.grad - leaves[name].grad).abs().max()) <= 20 * EXACT * largest, name

    if case in BASES and ":" not in variant:
        bases_record.exact(BASES[case], variant)


@pytest.mark.parametrize("case", CASES)
def test_merging_files_copies_and_detaching(case, tmp_path):
    model, base, adapter = moved(case, "DoRA")
    x, keys = inputs(), list(base.state_dict())
    with torch.no_grad():
        wanted = model(x)
        report = weft.merge(model, verify=(x,))
        assert report.output_error == 0 and same_bits(model(x), wanted)
        for name in adapter.layers:
            tensor = parameter_of(name)
            assert not torch.equal(model.get_parameter(tensor), base.get_parameter(tensor))
        weft.unmerge(model)
        assert all(same_bits(t, base.state_dict()[k]) for k, t in base_state(model).items())
        assert same_bits(model(x), wanted)
        weft.save(model, tmp_path)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
            assert same_bits(other(x), wanted)
        fresh = copy.deepcopy(base)
        weft.load(fresh, tmp_path)
        assert same_bits(fresh(x), wanted)
        weft.detach(model)
        assert list(model.state_dict()) == keys and same_bits(model(x), base(x))
    assert [type(m) for m in model.modules()] == [type(m) for m in base.modules()]
    assert all("_weft" not in "".join(m.__dict__) for m in model.modules())
    if case in BASES:
        bases_record.exact(BASES[case], "merge")


def base_state(model):
    return {k: t for k, t in model.state_dict().items() if ".weft." not in k}


def test_outside_of_its_forward_the_module_has_its_own_weights():
    model, base, _ = moved("LSTM")
    other = moved("attention")[0]
    assert model.rnn.weight_ih_l0 is model.rnn._parameters["weight_ih_l0"]
    assert model.rnn._flat_weights[0] is model.rnn.weight_ih_l0
    assert other.attn.out_proj.weight is other.attn.out_proj._parameters["weight"]
    assert weft.effective_weight(model.rnn, tensor="weight_ih_l0").shape == (24, 8)
    with pytest.raises(
        weft.WeftError, match=r"write which weight, tensor= one of \['weight_ih_l0'"
    ):
        weft.effective_weight(model.rnn)
    model(inputs())
    model.float().double(), base.float().double()  # torch gathers the weights again
    assert model.rnn._flat_weights[0] is model.rnn.weight_ih_l0
    with torch.no_grad(), weft.use(model, None):
        assert same_bits(model(inputs()), base(inputs()))


def test_threads_with_different_adapters_do_not_meet():
    model = built("LSTM, two ways and layers")
    x, wanted, found = inputs(), {}, {}
    for name, seed in (("a", 3), ("b", 4)):
        move(weft.attach(model, config("DoRA", targets=["rnn"], dtype="float64"), name), seed)
    for name in ("a", "b", None):
        with torch.no_grad(), weft.use(model, name):
            wanted[name] = model(x)

    def work(name):
        with torch.no_grad(), weft.use(model, name):
            found[name] = [model(x) for _ in range(20)]

    threads = [threading.Thread(target=work, args=(name,)) for name in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same_bits(y, wanted[name]) for name in wanted for y in found[name])


@pytest.mark.parametrize("case", [c for c in CASES if c != "a user's own"])
def test_one_adapter_per_row(case):
    model = built(case)
    output = Rows(model) if case in ("LSTM", "GRU", "RNN") or "two ways" in case else model
    targets = CASES[case][1]
    for name, variant in (("a", "LoRA"), ("b", "DVoRA")):
        move(weft.attach(output, config(variant, targets=targets, dtype="float64"), name))
    x, names = inputs(), ["b", None, "a"]
    with torch.no_grad():
        wanted = []
        for i, name in enumerate(names):
            with weft.use(output, name):
                wanted.append(output(x[i : i + 1]))
        with weft.use(output, names):
            found = output(x)
    assert distance(found, torch.cat(wanted)) < 1e-14


class Rows(nn.Module):
    """The recurrent part alone, with its last state, which has the rows elsewhere than the output."""

    def __init__(self, model):
        super().__init__()
        self.rnn = model.rnn

    def forward(self, x):
        y, h = self.rnn(x)
        for last in h if isinstance(h, tuple) else (h,):
            y = y + last.movedim(1, 0).flatten(1)[:, None, :1]
        return y


def test_rows_that_cannot_be_told_apart_are_refused():
    model = built("a user's own")
    for name in ("a", "b"):
        move(weft.attach(model, config("LoRA", targets=["kernel"], dtype="float64"), name))
    told = pytest.raises(
        weft.UnsupportedError, match="Kernel reads an adapted weight itself: it is"
    )
    with told, weft.use(model, ["a", "b", None]):
        model(inputs())
    with weft.use(model, ["a", "a", "a"]):
        found = model(inputs())
    with weft.use(model, "a"):
        assert torch.equal(found, model(inputs()))
    packed = nn.utils.rnn.pack_padded_sequence(inputs(), [4, 2, 1], batch_first=True)
    rnn = nn.ModuleDict({"rnn": nn.LSTM(8, 6, batch_first=True)}).double()
    for name in ("a", "b"):
        weft.attach(rnn, config("LoRA", targets=["rnn"], dtype="float64"), name)
    with pytest.raises(weft.WeftError), weft.use(rnn, ["a", "b", "a"]):
        rnn["rnn"](packed)


@pytest.mark.parametrize("case", ["attention", "LSTM", "a user's own"])
def test_strengths_sum_the_weights(case):
    model, base = built(case), built(case)
    weights = {n: p.detach().clone() for n, p in base.named_parameters()}
    for name, variant, strength in (("a", "LoRA", 0.5), ("b", "DoRA", -0.25)):
        adapter = weft.attach(model, config(variant, targets=CASES[case][1], dtype="float64"), name)
        move(adapter)
        for held, layer in adapter.layers.items():
            W, key = layer.base.weight().detach(), parameter_of(held)
            changed = weft.methods.base.effective_weight(layer.method, W, layer).detach()
            weights[key] += strength * (changed - W)
    with torch.no_grad(), weft.use(model, {"a": 0.5, "b": -0.25}):
        found = model(inputs())
    wanted = torch.func.functional_call(base, weights, (inputs(),))
    assert gap(found, wanted) < 1e-14


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_activations_give_the_same_gradients(reentrant):
    from torch.utils.checkpoint import checkpoint

    model, _, adapter = moved("LSTM, two ways and layers", "DoRA")
    x = inputs().requires_grad_()
    model(x).square().sum().backward()
    wanted = [p.grad.clone() for p in adapter.parameters()]
    for p in adapter.parameters():
        p.grad = None
    checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    assert all(gap(p.grad, w) < 1e-14 for p, w in zip(adapter.parameters(), wanted, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_few_bits_the_weight_is_rounded_as_merging_rounds_it(dtype):
    model = built("attention", dtype)
    base = copy.deepcopy(model)
    adapter = weft.attach(model, config("DoRA", targets=["attn"]))
    with torch.no_grad():
        assert same_bits(model(inputs(dtype)), base(inputs(dtype)))
        move(adapter)
        attached = model(inputs(dtype))
        assert weft.merge(model, verify=(inputs(dtype),)).output_error == 0
        assert same_bits(model(inputs(dtype)), attached)


def test_autocast_computes_the_weight_in_full_precision():
    model, _, _ = moved("attention", "DoRA", torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        attached = model(inputs(torch.float32))
        weft.merge(model)
        assert same_bits(model(inputs(torch.float32)), attached)


def test_starts_at_the_weight_and_a_schedule_of_ranks():
    model, base, adapter = moved("attention", "LoRA", init="pissa")
    found, wanted = model(inputs()), definition(base, adapter, inputs())[0]
    assert gap(found, wanted) <= 4 * EXACT
    model = built("GRU", torch.float32)
    given = config("AdaLoRA", targets=["rnn"], r=4, final_r=2, warm_up=1, final=1, total_steps=6)
    adapter = weft.attach(model, given)
    optimiser = torch.optim.AdamW(adapter.parameters(), 1e-2)
    before = weft.snapshot(model)
    for _ in range(6):
        model(inputs(torch.float32)).square().sum().backward()
        optimiser.step()
        optimiser.zero_grad()
    assert sum(adapter.ranks.values()) == 2 * len(adapter.layers)
    weft.audit(model, before, weft.snapshot(model))


# What is named, and what is refused.


def names(model, targets, **given):
    adapter = weft.attach(model, weft.LoRA(r=2, targets=targets, **given))
    found = list(adapter.layers)
    weft.detach(model)
    return found


def test_which_weights_a_name_means():
    stack = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 9, batch_first=True) for _ in range(2))
    model = nn.ModuleDict({"layers": stack, "rnn": nn.LSTM(8, 6), "own": held_models.Kernel(8, 3)})
    both = [f"layers.{i}.self_attn.{n}" for i in (0, 1) for n in held_models.ATTENTION]
    linear = [f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)]
    assert names(model, ["self_attn"]) == names(model, "attention") == both
    assert names(model, ["self_attn.in_proj_weight"]) == names(model, "in_proj_weight") == both[::2]
    assert names(model, ["out_proj"]) == names(model, "attention-output") == both[1::2]
    assert sorted(names(model, "all-linear")) == sorted(both + linear)
    assert names(model, "all-linear", exclude=["self_attn"]) == linear
    assert names(model, "all-linear", layers=[1], exclude=["in_proj_weight"])[:1] == both[3:]
    assert names(model, ["rnn"]) == ["rnn.weight_ih_l0", "rnn.weight_hh_l0"]
    assert names(model, "rnn.weight_hh_l0") == names(model, r".*_hh_l\d") == ["rnn.weight_hh_l0"]
    assert names(model, ["own"]) == names(model, ["kernel"]) == ["own.kernel"]
    assert names(model, {"in_proj_weight": {"r": 3}, "linear1": {}})[0] == both[0]
    plan = weft.attach(model, weft.LoRA(r=2)).plan()
    reasons = {f.name: f.reason for f in plan.frozen}
    assert reasons["rnn.weight_ih_l0"].endswith("adapted if targets name it")
    text = " ".join(str(plan).split())
    assert "layers.{0..1}.self_attn.in_proj_weight weight 24x8 2" in text
    assert "kind weight: their modules read them" in text and "slower" in text


def test_a_method_that_cannot_act_on_weights_leaves_them_out_by_name():
    def encoder():
        return nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 9, batch_first=True), 1, enable_nested_tensor=False
        )

    adapter = weft.attach(encoder(), weft.LoRA(r=2, dropout=0.1))
    assert list(adapter.layers) == ["layers.0.linear1", "layers.0.linear2"]
    reasons = {f.name: f.reason for f in adapter.frozen}
    assert (
        "dropout=0.1 has no input of the low-rank branch"
        in reasons["layers.0.self_attn.in_proj_weight"]
    )
    with pytest.raises(weft.TargetError, match=r"'layers.0.self_attn.out_proj': .* dropout=0.1"):
        weft.attach(encoder(), weft.LoRA(r=2, dropout=0.1, targets=["out_proj"]))
    given = {"in_proj_weight": {"dropout": 0.0}, "linear1": {}}
    adapter = weft.attach(encoder(), weft.LoRA(r=2, dropout=0.1, targets=given))
    assert len(adapter.layers) == 2
    with pytest.raises(
        weft.TargetError, match="Bottleneck acts on the input and output of a layer"
    ):
        weft.attach(encoder(), weft.Bottleneck(r=2, targets=["out_proj"]))


class Root(nn.Module):
    def __init__(self):
        super().__init__()
        self.kernel, self.up = nn.Parameter(torch.randn(4, 4)), nn.Linear(4, 4)

    def forward(self, x):
        return self.up(x) @ self.kernel


def test_what_is_refused_by_name():
    with pytest.raises(weft.TargetError, match="Root, the model itself, reads it"):
        weft.attach(Root(), weft.LoRA(targets=["kernel"]))
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2), "up": nn.Linear(8, 8)})
    nn.utils.parametrizations.orthogonal(model["attn"], "in_proj_weight")
    with pytest.raises(weft.TargetError, match=r"'attn.in_proj_weight' .* it is parametrised"):
        weft.attach(model, weft.LoRA(targets=["in_proj_weight"]))
    assert names(model, "all-linear") == ["attn.out_proj", "up"]
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2), "up": nn.Linear(8, 8)})
    with pytest.raises(weft.TargetError, match="is adapted or trained in full"):
        weft.attach(model, weft.LoRA(targets=["attn"], modules_to_save=["attn"]))
    adapter = weft.attach(model, weft.LoRA(modules_to_save=["attn"]))
    assert list(adapter.layers) == ["up"] and "attn.in_proj_weight" in adapter.selected
    tied = nn.ModuleDict({"a": held_models.Kernel(4, 4), "b": held_models.Kernel(4, 4)})
    tied["b"].kernel = tied["a"].kernel
    with pytest.raises(weft.TargetError, match=r"'a.kernel' and 'b.kernel' are tied"):
        weft.attach(tied, weft.LoRA(targets=["a.kernel"]))


class Unread(nn.Module):
    """Takes its weight from where no property is."""

    def __init__(self):
        super().__init__()
        self.inner = held_models.Kernel(8, 8)
        self.up = nn.Linear(8, 8)
        self.inner.forward = lambda x: nn.functional.linear(x, self.inner._parameters["kernel"])

    def forward(self, x):
        return self.up(self.inner(x))


def test_a_module_that_takes_its_weight_past_its_attribute_is_noticed():
    model = Unread()
    weft.attach(model, weft.LoRA(r=2, targets=["kernel", "up"]))
    x = inputs(torch.float32)
    with pytest.raises(weft.MergeError, match=r"never calls 'inner.kernel' but reads its weight"):
        weft.merge(model, verify=(x,))
    with pytest.raises(weft.WeftError, match=r"never calls 'inner.kernel' but reads its weight"):
        model(x)


def test_a_weight_that_is_exchanged_after_attach_is_noticed():
    model, _, _ = moved("attention")
    model.attn.in_proj_weight = nn.Parameter(torch.randn(24, 8, dtype=torch.float64))
    model(inputs())  # the adapter acts on the new one
    model.attn = nn.MultiheadAttention(8, 2, batch_first=True).double()
    with pytest.raises(weft.WeftError, match=r"'attn' \(MultiheadAttention\) was replaced"):
        model(inputs())
