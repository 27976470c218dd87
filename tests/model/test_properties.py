"""Shapes, ranks and numbers drawn at random: forward, merge, gradient and count hold for all of
them.
"""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

import weft
from oracle import FORWARDS, ORACLES, count
from support import (
    KINDS,
    METHODS,
    PROMPTS,
    RULE_VARIANTS,
    TURNS_WEIGHTS,
    check_close,
    config,
    host,
    same_bits,
)

LAYERED = sorted(set(METHODS) - set(PROMPTS))
SIZE = st.integers(1, 24)
LEADING = st.lists(st.integers(0, 4), max_size=3).map(tuple)


@st.composite
def cases(draw):
    """One layer of any kind and shape under any method of any rank, moved; and an input of any
    leading shape.
    """
    variant, kind = draw(st.sampled_from(RULE_VARIANTS)), draw(st.sampled_from(KINDS))
    in_, out, seed = draw(SIZE), draw(SIZE), draw(st.integers(0, 2**31))
    torch.manual_seed(seed)
    layer = host(kind, in_, out, bias=draw(st.booleans()))
    zero = draw(st.sets(st.integers(0, out - 1), max_size=2))
    with torch.no_grad():
        for row in zero:
            (layer.weight if kind == "linear" else layer.weight.t())[row] = 0
    model = nn.Sequential(layer)
    made = config(
        variant,
        r=draw(st.integers(1, 30)),
        alpha=draw(st.floats(0.1, 50)),
        seed=seed,
        targets=["0"],
        d_init=draw(st.floats(0.01, 3)),
    )
    if getattr(made, "starts_at_weight", False):
        made = weft.methods.replace(made, {"r": min(made.r, in_, out)})
    site = weft.attach(model, made).sites["0"]
    factor = draw(st.sampled_from([0.01, 0.3, 1.0]))
    with torch.no_grad():
        for name, p in site.trainable().items():
            p.add_(factor * torch.randn_like(p))
            if name == "m":
                p[draw(st.integers(0, out - 1))] = draw(st.sampled_from([0.0, -1.5, 2.0]))
    leading = draw(LEADING)
    x = torch.randint(0, in_, leading) if kind == "embedding" else torch.randn(*leading, in_)
    return model, site, x, variant


def tensors_of(site):
    tensors = {k: p.detach().double() for k, p in site.named_parameters()}
    return tensors | {k: b.double() for k, b in site.named_buffers()}


def effective(site, layer, variant):
    W = layer.weight.detach().double()
    W = W if site.base.kind == "linear" else W.t()
    return (
        ORACLES[variant.partition(":")[0]](W, tensors_of(site), site.method)
        if variant in TURNS_WEIGHTS
        else W
    )


def output(layer, W, x, site):
    """The layer's output from the weight that it has, and from the adapter's tensors where that is
    no weight.
    """
    bias, forward = getattr(layer, "bias", None), FORWARDS.get(type(site.method).__name__)
    x = (
        torch.eye(W.shape[1], dtype=torch.float64)[x]
        if isinstance(layer, nn.Embedding)
        else x.double()
    )
    y = x @ W.t() if bias is None else x @ W.t() + bias.detach().double()
    return y if forward is None else forward(x, y, tensors_of(site), site.method)


@given(cases())
def test_forward_is_the_oracles_and_merging_keeps_it(case):
    model, site, x, variant = case
    W = effective(site, model[0], variant)
    assume(W.isfinite().all())  # a zero row whose update is zero too has no direction
    y = model(x)
    check_close(y, output(model[0], W, x, site), torch.float32)
    if variant not in TURNS_WEIGHTS:
        return
    check_close(weft.effective_weight(model[0]), W, torch.float32)
    base = model[0].weight.clone()
    weft.merge(model, verify=x if x.numel() else None)
    check_close(model(x), output(model[0], W, x, site), torch.float32)
    weft.unmerge(model)
    assert same_bits(model[0].weight, base) and same_bits(model(x), y)


@given(cases())
def test_gradients_are_finite_and_the_count_is_the_formula(case):
    model, site, x, variant = case
    out, in_ = site.shape
    model(x).pow(2).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in site.parameters())
    assert sum(p.numel() for p in site.parameters()) == count(variant, out, in_, site.method.r)


@given(
    st.sampled_from(LAYERED),
    st.sampled_from(KINDS),
    SIZE,
    SIZE,
    st.integers(1, 30),
    st.integers(0, 99),
)
def test_an_untrained_adapter_of_any_shape_is_the_base(name, kind, in_, out, r, seed):
    torch.manual_seed(seed)
    model = nn.ModuleDict(
        {"layer": host(kind, in_, out), "mid": nn.Linear(3, 2), "head": nn.Linear(2, 2)}
    )
    x = torch.randint(0, in_, (5,)) if kind == "embedding" else torch.randn(5, in_)
    before = model["layer"](x)
    weft.attach(model, config(name, r=r, targets=["layer"]))
    assert same_bits(model["layer"](x), before)


@given(st.sampled_from(RULE_VARIANTS), SIZE, SIZE, st.integers(0, 99))
def test_a_weight_that_is_all_zero_trains_without_nan(variant, in_, out, seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(in_, out))
    nn.init.zeros_(model[0].weight)
    r = min(3, in_, out) if "pissa" in variant else 3
    adapter = weft.attach(model, config(variant, targets=["0"], r=r))
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.01)
    x = torch.randn(5, in_)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).sub(1).pow(2).mean().backward()
        for p in adapter.parameters():
            assert p.grad.isfinite().all()
            p.grad.clamp_(-1, 1)
        optimizer.step()
    assert model(x).isfinite().all()
    assert variant not in TURNS_WEIGHTS or weft.effective_weight(model[0]).isfinite().all()


@pytest.mark.parametrize("variant", RULE_VARIANTS)
def test_inputs_in_any_order_of_memory(variant):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 11))
    site = weft.attach(model, config(variant, targets=["0"])).sites["0"]
    with torch.no_grad():
        for p in site.parameters():
            p.add_(0.3 * torch.randn_like(p))
    W = effective(site, model[0], variant)
    dense = torch.randn(3, 7, 4)
    for x in (
        dense.transpose(1, 2),
        torch.randn(6, 14)[:, ::2],
        torch.randn(7).expand(5, 7),
        torch.randn(7, 5).t(),
    ):
        assert not x.is_contiguous()
        check_close(model(x), output(model[0], W, x, site), torch.float32)
