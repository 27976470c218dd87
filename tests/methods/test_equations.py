"""Every method on every kind of layer against a float64 oracle that shares no code with the
library.
"""

import math

import pytest
import torch

import oracle
import weft
from support import (
    KINDS,
    METHODS,
    PROMPT_VARIANTS,
    PROMPTS,
    RULE_VARIANTS,
    RULES,
    SELECTIONS,
    STARTS_AT_BASE,
    TOLERANCE,
    TURNS_WEIGHTS,
    VARIANTS,
    awake,
    check_close,
    config,
    inputs,
    net,
    oracle_output,
    oracle_weight,
    same_bits,
    set_way,
)
from weft.methods.config import LowRankConfig
from weft.ops.norm import at_least_float32

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def test_every_method_that_turns_weights_has_an_oracle_and_a_formula():
    assert (
        set(RULES)
        == set(oracle.ORACLES) | set(oracle.FORWARDS)
        == {key.partition(":")[0] for key in oracle.FORMULAS}
    )
    assert {v.partition(":")[0] for v in TURNS_WEIGHTS} == set(oracle.ORACLES)
    assert set(PROMPTS) == set(oracle.PROMPT_FORMULAS)
    assert [*RULES, *SELECTIONS, *PROMPTS] and set(RULES) | set(SELECTIONS) | set(PROMPTS) == set(
        METHODS
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_is_the_oracles(variant, kind, dtype):
    a = awake(variant, kind, dtype, held="float64" if dtype == torch.float64 else "float32")
    with torch.no_grad():
        check_close(a.run(), oracle_output(a, a.declared()), dtype)


@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_is_the_oracles_without_a_bias(variant):
    if variant == "BitFit":
        with pytest.raises(weft.TargetError, match="no bias"):
            weft.attach(net(bias=False), weft.BitFit())
        return
    a = awake(variant, bias=False)
    check_close(a.run(), oracle_output(a, a.declared()), torch.float32)


@pytest.mark.parametrize("variant", [*RULE_VARIANTS, *PROMPT_VARIANTS])
def test_forward_is_the_oracles_with_tensors_in_bfloat16(variant):
    a = awake(variant, held="bfloat16")
    assert {p.dtype for p in a.adapter.parameters()} == {torch.bfloat16}
    check_close(a.run(), oracle_output(a, a.declared()), torch.float32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", TURNS_WEIGHTS)
def test_the_effective_weight_is_the_oracles_in_float32(variant, kind):
    for dtype in (torch.float32, torch.bfloat16):
        a = awake(variant, kind, dtype)
        for module in a.adapter.sites:
            found = weft.effective_weight(a.model.get_submodule(module))
            assert found.dtype == torch.float32 and not found.requires_grad
            check_close(found, oracle_weight(a, module, a.declared()), torch.float32, module)


@pytest.mark.parametrize("variant", TURNS_WEIGHTS)
def test_the_effective_weight_of_a_float64_model_has_float64_accuracy(variant):
    a = awake(variant, dtype=torch.float64)
    for module in a.adapter.sites:
        found = weft.effective_weight(a.model.get_submodule(module))
        check_close(found, oracle_weight(a, module, a.declared()), torch.float64, module)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_those_of_autograd_through_the_oracle(variant, kind, dtype):
    a = awake(variant, kind, dtype, held="float64" if dtype == torch.float64 else "float32")
    declared = a.declared()
    direction = torch.randn(a.x.shape[0], 6, 5, generator=torch.Generator().manual_seed(3))
    (a.run() * direction).sum().backward()
    wanted = torch.autograd.grad(
        (oracle_output(a, declared) * direction.double()).sum(), list(declared.values())
    )
    for (name, p), gradient in zip(a.adapter.named_parameters(), wanted, strict=True):
        assert gradient.abs().max() > 0, name
        check_close(p.grad, gradient, dtype, name)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_gradient_of_the_input_is_the_oracles(variant, kind):
    a = awake(variant, kind)
    ours = a.x.clone().requires_grad_()
    theirs = a.x.double().requires_grad_()
    a.model(ours).pow(2).sum().backward()
    oracle_output(a, a.declared(), theirs).pow(2).sum().backward()
    check_close(ours.grad, theirs.grad, torch.float32)


LOW_RANK = [v for v in TURNS_WEIGHTS if issubclass(METHODS[v.partition(":")[0]], LowRankConfig)]


@pytest.mark.parametrize("way", ["native", "fused"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("variant", LOW_RANK)
def test_the_ways_of_larger_layers_are_the_oracles_too(variant, kind, dtype, way, monkeypatch):
    """Layers as small as those of these tests are built; ops/plan.py has two more ways."""
    set_way(monkeypatch, way)
    a = awake(variant, kind, dtype, held="float64" if dtype == torch.float64 else "float32")
    with torch.no_grad():
        check_close(a.run(), oracle_output(a, a.declared()), dtype)
    declared, ours = a.declared(), a.x.clone().requires_grad_()
    theirs = a.x.double().requires_grad_()
    a.model(ours).pow(2).sum().backward()
    wanted = oracle_output(a, declared, theirs).pow(2).sum()
    leaves = [theirs, *declared.values()]
    found = [ours.grad, *(p.grad for p in a.adapter.parameters())]
    for mine, gradient in zip(found, torch.autograd.grad(wanted, leaves), strict=True):
        check_close(mine, gradient, dtype)


@pytest.mark.parametrize("way", ["native", "fused"])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("variant", LOW_RANK)
def test_an_untrained_adapter_of_a_larger_layer_equals_the_base(variant, kind, way, monkeypatch):
    set_way(monkeypatch, way)
    model, x = net(kind), inputs(kind)
    before = model(x)
    weft.attach(model, config(variant))
    with torch.no_grad():
        assert same_bits(model(x), before)
    assert same_bits(model(x), before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_finite_differences_of_the_oracle(variant, kind):
    """In float64, so that only the differences round. Where the norm is a constant to the gradient
    it is held at its value while the tensors move.
    """
    a = awake(variant, kind, torch.float64, held="float64")
    a.run().pow(2).sum().backward()
    declared = {name: t.detach() for name, t in a.declared().items()}
    norms = None
    if getattr(a.config, "norm_grad", "exact") == "constant":
        inner = {"DoRA": oracle.lora, "DVoRA": oracle.vera}[type(a.config).__name__]
        norms = {m: _inner_weight(a, m, declared, inner).norm(dim=1) for m in a.adapter.sites}
    step = 1e-6
    for name, p in a.adapter.named_parameters():
        direction = torch.randn(
            p.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4)
        )
        direction += (
            p.grad.double() / p.grad.double().norm()
        )  # so that the derivative is well away from 0
        up, down = ({**declared, name: declared[name] + s * direction} for s in (step, -step))
        difference = (
            oracle_output(a, up, norms=norms).pow(2).sum()
            - oracle_output(a, down, norms=norms).pow(2).sum()
        ) / (2 * step)
        found, size = (p.grad.double() * direction).sum(), p.grad.double().norm() * direction.norm()
        gap = float(
            (found - difference).abs() / size
        )  # of the largest derivative that a direction of this length has
        assert gap <= TOLERANCE[torch.float32], f"{name} differs by {gap:.1e}"


def _inner_weight(a, module, declared, inner):
    stored = a.base[f"{module}.weight"]
    W = stored.t() if module == "layer" and a.kind != "linear" else stored
    own = {
        k.removeprefix(f"{module}."): v
        for k, v in {**a.frozen(), **declared}.items()
        if k.startswith(f"{module}.")
    }
    return inner(W, own, a.config)


@pytest.mark.parametrize("name", [n for n in RULES if hasattr(config(n), "norm_grad")])
def test_the_constant_norm_changes_the_gradient_and_not_the_value(name):
    constant, exact = awake(name), awake(f"{name}:norm_grad=exact")
    check_close(constant.run(), exact.run(), torch.float32)
    for a in (constant, exact):
        a.run().pow(2).sum().backward()
    for (key, p), (_, q) in zip(
        constant.adapter.named_parameters(), exact.adapter.named_parameters(), strict=True
    ):
        same = (p.grad - q.grad).abs().max() <= 1e-5 * q.grad.abs().max()
        # The last adapted layer's magnitude sees no norm's gradient; every direction does.
        assert same == key.endswith("mid.m") or key == "layer.m", key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", STARTS_AT_BASE)
def test_an_untrained_adapter_equals_the_base_bit_for_bit(variant, kind, dtype):
    model, x = net(kind, dtype), inputs(kind, dtype=dtype)
    before = model(x)
    adapter = weft.attach(model, config(variant))
    assert same_bits(model(x), before)
    for module in adapter.sites if variant in TURNS_WEIGHTS else ():
        layer = model.get_submodule(module)
        check_close(
            weft.effective_weight(layer), adapter.sites[module].base.weight(), torch.float32
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", VARIANTS)
def test_the_trained_count_is_the_formula(name, kind):
    for r in (1, 4, 13):
        model = net(kind, variant=name)
        sizes = {n: p.numel() for n, p in model.named_parameters()}
        adapter = weft.attach(model, config(name, r=r))
        wanted = {
            "Full": sum(sizes.values()),
            "TopLayers": sizes["mid.weight"] + sizes["mid.bias"],
            "Head": sizes["head.weight"] + sizes["head.bias"],
            "BitFit": sum(
                n for key, n in sizes.items() if key.endswith("bias") and not key.startswith("head")
            ),
            **{v: oracle.PROMPT_FORMULAS[v.partition(":")[0]](config(v)) for v in PROMPT_VARIANTS},
        }.get(name) or sum(oracle.count(name, out, in_, r) for out, in_ in ((11, 7), (9, 11)))
        assert adapter.num_parameters == wanted == sum(p.numel() for p in adapter.parameters())
        assert adapter.plan().trainable == wanted
        trains = {id(p) for p in model.parameters() if p.requires_grad}
        assert trains == {id(p) for p in adapter.parameters()}


@pytest.mark.parametrize("variant", [v for v in RULE_VARIANTS if v not in TURNS_WEIGHTS])
def test_what_turns_no_weight_has_no_effective_weight_and_says_why(variant):
    a = awake(variant)
    with pytest.raises(
        weft.UnsupportedError, match=rf"{type(a.config).__name__} has no effective weight: \w+ "
    ):
        weft.effective_weight(a.model.layer)


@pytest.mark.parametrize("variant", PROMPT_VARIANTS)
def test_virtual_positions_are_no_weight_and_start_off_the_base(variant):
    a = awake(variant)
    with pytest.raises(
        weft.UnsupportedError, match=rf"{type(a.config).__name__} has no effective weight: \w+ "
    ):
        weft.effective_weight(next(iter(a.adapter.sites.values())).base.module)
    fresh = net(variant=variant)
    with torch.no_grad():
        base = fresh(a.x)
        adapter = weft.attach(fresh, config(variant))
        assert all(p.abs().max() > 0 for name, p in adapter.named_parameters() if ".b_" not in name)
        assert not same_bits(fresh(a.x), base) and not type(a.config).starts_at_base


def test_states_behind_the_prompt_are_the_oracles_too():
    for dtype in DTYPES:
        a = awake(
            "PreLayer", dtype=dtype, l_i=2, held="float64" if dtype == torch.float64 else "float32"
        )
        with torch.no_grad():
            check_close(a.run(), oracle_output(a, a.declared()), dtype)


@pytest.mark.parametrize("variant", TURNS_WEIGHTS)
def test_a_layer_can_be_the_whole_model(variant):
    layer = torch.nn.Linear(7, 11)
    base = layer.weight.detach().clone()
    adapter = weft.attach(layer, config(variant, targets="all-linear"))
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.3)
    x = inputs("linear")
    check_close(layer(x), x @ weft.effective_weight(layer).t() + layer.bias, torch.float32)
    assert not torch.equal(weft.effective_weight(layer), base)
    assert all("." not in name for name, _ in adapter.named_parameters())


@pytest.mark.parametrize("variant", [v for v in RULE_VARIANTS if hasattr(config(v), "dropout")])
@pytest.mark.parametrize("kind", KINDS)
def test_dropout_acts_on_the_update_alone_and_in_training_alone(variant, kind):
    a = awake(variant, kind, dropout=0.4)
    a.model.eval()
    check_close(a.run(), oracle_output(a, a.declared()), torch.float32)
    a.model.train()
    with torch.no_grad():
        first, second = a.run(), a.run()
        assert not torch.equal(first, second)
        with weft.use(a.model, None):
            assert torch.equal(a.run(), a.run())


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_keeps_the_expected_output(kind):
    """Over many draws the mean of one adapted layer's output is that without dropout, within five
    standard errors.
    """
    a = awake("LoRA", kind, dropout=0.4)
    layer = a.model.layer
    with torch.no_grad():
        layer.eval()
        wanted = layer(a.x)
        layer.train()
        draws = torch.stack([layer(a.x) for _ in range(2000)])
    assert (draws.std(dim=0) > 1e-3).any(), "nothing was dropped"
    spread = draws.std(dim=0) / math.sqrt(len(draws))
    assert ((draws.mean(dim=0) - wanted).abs() <= 5 * spread + 1e-6).all()


@pytest.mark.parametrize("variant", [*RULE_VARIANTS, *PROMPT_VARIANTS])
def test_autocast_keeps_the_effective_weight_exact_and_the_output_close(variant):
    a = awake(variant)
    layer, outside = a.model.layer, a.run()
    plain = weft.effective_weight(layer) if variant in TURNS_WEIGHTS else None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert plain is None or same_bits(weft.effective_weight(layer), plain)
        inside = a.run()
    assert inside.dtype == torch.bfloat16
    check_close(inside, outside, torch.bfloat16)


@pytest.mark.parametrize("variant", RULE_VARIANTS)
def test_zero_rows_of_the_weight_stay_finite(variant):
    model = net()
    with torch.no_grad():
        model.layer.weight[2:5].zero_()
    before = model(inputs("linear"))
    adapter = weft.attach(model, config(variant))
    assert same_bits(model(inputs("linear")), before)
    optimiser = torch.optim.SGD(adapter.parameters(), lr=0.01)
    for _ in range(3):
        optimiser.zero_grad()
        model(inputs("linear")).pow(2).sum().backward()
        assert all(p.grad.isfinite().all() for p in adapter.parameters())
        torch.nn.utils.clip_grad_value_(adapter.parameters(), 10)
        optimiser.step()
    assert model(inputs("linear")).isfinite().all()


def test_wide_is_float32_or_what_is_wider():
    assert (
        at_least_float32(torch.zeros(1, dtype=torch.bfloat16)).dtype
        == at_least_float32(torch.zeros(1)).dtype
        == torch.float32
    )
    assert at_least_float32(torch.zeros(1, dtype=torch.float64)).dtype == torch.float64
    assert TOLERANCE[torch.float64] < TOLERANCE[torch.float32] < TOLERANCE[torch.bfloat16]
