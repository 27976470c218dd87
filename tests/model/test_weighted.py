"""Several adapters at once with strengths: y + Σ w (adapter(x) - y) in every layer."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import weft
from support import (
    KINDS,
    TURNS_WEIGHTS,
    awake,
    check_close,
    config,
    distance,
    inputs,
    move,
    net,
    oracle_weight,
    reference_paths,
    same_bits,
)
from weft.methods import METHODS
from weft.methods.config import LowRankConfig

LOW_RANK = [
    v for v in TURNS_WEIGHTS if issubclass(METHODS[v.partition(":")[0]], LowRankConfig)
]  # with the variants of their formulas
STRENGTHS = {"a": 0.7, "b": -0.4, "c": 1.3}


def three(variant, kind="linear", dtype=torch.float64):
    """Three adapters of different ranks; the third is LoRA, and only on one of the layers."""
    model = net(kind, dtype)
    held = str(dtype).removeprefix("torch.")
    a = awake(variant, kind, dtype, model=model, name="a", held=held)
    b = awake(variant, kind, dtype, model=model, name="b", held=held, r=2, seed=3, alpha=1.0)
    c = awake("LoRA", kind, dtype, model=model, name="c", held=held, targets=["mid"], seed=4)
    move(b.adapter, 5)
    return model, {"a": a, "b": b, "c": c}


def by_definition(parts, strengths, declared, x):
    """The model's output in float64 from the weights W + Σ w (W' - W) of the tests' own equations."""
    first = next(iter(parts.values()))
    h = torch.eye(7, dtype=torch.float64)[x] if first.kind == "embedding" else x.double()
    for module in ("layer", "mid", "head"):
        W = first.base[f"{module}.weight"]
        W = U = W.t() if module == "layer" and first.kind != "linear" else W
        for name, part in parts.items():
            U = U + strengths[name] * (oracle_weight(part, module, declared[name]) - W)
        bias = first.base.get(f"{module}.bias")
        h = h @ U.t() if bias is None else h @ U.t() + bias
        h = h if module == "head" else torch.tanh(h)
    return h


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", LOW_RANK)
def test_output_and_gradients_are_those_of_the_definition(variant, kind, training):
    model, parts = three(variant, kind)
    model.train(training)
    x = inputs(kind, dtype=torch.float64)
    declared = {name: part.declared() for name, part in parts.items()}
    wanted = by_definition(parts, STRENGTHS, declared, x)
    with weft.use(model, STRENGTHS):
        found = model(x)
    check_close(found, wanted, torch.float64)
    weight = torch.linspace(-1, 1, wanted.numel(), dtype=torch.float64).view_as(wanted)
    (found * weight).sum().backward()
    (wanted * weight).sum().backward()
    for name, part in parts.items():
        for tensor, p in part.adapter.named_parameters():
            check_close(p.grad, declared[name][tensor].grad, torch.float64, f"{name} {tensor}")
    with torch.no_grad(), weft.use(model, STRENGTHS):
        check_close(model(x), wanted, torch.float64)


@pytest.mark.parametrize("variant", ["LoRA", "DVoRA"])
def test_the_general_definition_and_the_direct_ways_agree(variant, monkeypatch):
    model, parts = three(variant, dtype=torch.float32)
    with torch.no_grad(), weft.use(model, STRENGTHS):
        direct = model(parts["a"].x)
        reference_paths(monkeypatch)
        check_close(model(parts["a"].x), direct, torch.float32)


def test_a_small_update_survives_in_bfloat16():
    """Adapter minus base, taken of two rounded outputs, would be noise here."""
    model = net(dtype=torch.bfloat16)
    a = awake("LoRA", dtype=torch.bfloat16, model=model, name="a")
    with torch.no_grad():
        for layer in a.adapter.layers.values():
            layer.B.mul_(2**-10)
    layer, x = a.adapter.layers["layer"], inputs("linear", dtype=torch.bfloat16)
    with weft.use(model, {"a": 1024.0}), torch.no_grad():
        found = model.layer(x)
    W = a.base["layer.weight"]
    U = W + 1024 * (weft.effective_weight(model.layer, "a").double() - W)
    check_close(found, x.double() @ U.t() + a.base["layer.bias"], torch.bfloat16)
    assert layer.active.current() == "a"


def test_one_adapter_at_full_strength_is_that_adapter_and_none_is_the_base():
    model, parts = three("DoRA")
    x = parts["a"].x
    with weft.use(model, "a"):
        alone = model(x)
    with weft.use(model, None):
        base = model(x)
    with weft.use(model, {"a": 1.0}):
        check_close(model(x), alone, torch.float64)
    with weft.use(model, {"a": 0.0, "b": 0}):
        assert same_bits(model(x), base)
    assert distance(alone, base) > 1e-2


def test_recomputation_in_backward_sees_the_same_sum():
    model, parts = three("DoRA")
    with weft.use(model, STRENGTHS):
        plain = model(parts["a"].x)
        out = checkpoint(model, parts["a"].x, use_reentrant=False)
    plain.sum().backward()
    wanted = [p.grad.clone() for p in parts["b"].adapter.parameters()]
    model.zero_grad()
    with weft.use(model, "c"):
        out.sum().backward()
    for p, grad in zip(parts["b"].adapter.parameters(), wanted, strict=True):
        check_close(p.grad, grad, torch.float64)


def test_a_compiled_model_and_one_with_virtual_tokens_beside():
    model, parts = three("DoRA", dtype=torch.float32)
    x = parts["a"].x
    with torch.no_grad(), weft.use(model, STRENGTHS):
        wanted = model(x)
        check_close(torch.compile(model, backend="eager")(x), wanted, torch.float32)
    model = net(variant="Prefix")
    a = awake("LoRA", model=model, name="a")
    awake("Prefix", model=model, name="tokens")
    with weft.use(model, "a"):
        alone = model(a.x)
    with weft.use(model, {"a": 1}):
        check_close(model(a.x), alone, torch.float32)


@pytest.mark.parametrize(
    ("strengths", "error", "says"),
    [
        ({}, weft.WeftError, "give adapters and strengths"),
        ({"d": 1.0}, weft.WeftError, "no adapter is named 'd'"),
        ({3: 1.0}, weft.WeftError, "no adapter is named 3"),
        ({"a": "0.7"}, weft.ConfigError, "the strength of 'a' is '0.7'"),
        ({"a": True}, weft.ConfigError, "the strength of 'a' is True"),
        ({"a": float("nan")}, weft.ConfigError, "write a finite number"),
        ({"a": None}, weft.ConfigError, "write a finite number"),
    ],
    ids=str,
)
def test_what_cannot_be_summed_is_refused_before_any_compute(strengths, error, says):
    model, _ = three("LoRA")
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(error, match=says):
        weft.use(model, strengths)
    with pytest.raises(weft.WeftError, match="no adapter is named"):
        weft.use(model, [{"a": 1.0}, None])


@pytest.mark.parametrize(
    ("method", "changes", "says"),
    [
        ("Bottleneck", {}, "'other' .Bottleneck. is not a low-rank change of weights"),
        ("Prefix", {}, "'other' .Prefix. is not a low-rank"),
        ("Full", {}, r"trains base tensors \('layer.weight', ...\)"),
        ("LoRA", {"modules_to_save": ["head"]}, r"trains base tensors \('head.weight', ...\)"),
    ],
)
def test_methods_without_a_sum_are_refused_by_name(method, changes, says):
    model = net(variant=method)
    weft.attach(model, config("LoRA"), name="a")
    weft.attach(model, config(method, **changes), name="other")
    with pytest.raises(weft.UnsupportedError, match=says):
        weft.use(model, {"a": 0.5, "other": 0.5})
    with pytest.raises(weft.UnsupportedError, match=says):
        weft.combine(model, {"a": 0.5, "other": 0.5}, name="both")


def test_adapters_of_a_sum_in_use_stay_where_they_are():
    model, _ = three("LoRA")
    with (
        weft.use(model, {"a": 1, "b": 2}),
        pytest.raises(weft.WeftError, match="'b' is used by an open"),
    ):
        weft.detach(model, "b")
    weft.merge(model, "a")
    with pytest.raises(weft.MergeError, match="is merged"):
        weft.use(model, {"a": 1.0})
    weft.unmerge(model)
    weft.use(model, {"a": 1, "b": 2})
    weft.detach(model, "c")
    weft.detach(model, "b")  # a statement holds nothing, and the base is active then
    assert model.layer.__dict__["_weft_active"].current() is None
