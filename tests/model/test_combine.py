"""`weft.combine`: a weighted sum of adapters as one adapter, exact by the definition of the sum."""

import pytest
import torch
from test_weighted import LOW_RANK, STRENGTHS, three

import weft
from support import KINDS, awake, check_close, config, inputs, move, net, same_bits


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", LOW_RANK)
def test_the_sum_is_the_definition_and_what_use_computes(variant, kind, dtype):
    model, parts = three(variant, kind, dtype)
    x = inputs(kind, dtype=dtype)
    with torch.no_grad(), weft.use(model, STRENGTHS):
        wanted = model(x)
    both = weft.combine(model, STRENGTHS, name="both")
    with torch.no_grad():
        check_close(model(x), wanted, dtype)  # it is active
    magnitudes = variant.startswith(("DoRA", "DVoRA"))
    assert type(both.config) is (weft.DoRA if magnitudes else weft.LoRA)
    for module, layer in both.layers.items():
        W = parts["a"].base[f"{module}.weight"]
        W = W.t() if module == "layer" and kind != "linear" else W
        U = W + sum(
            w * (weft.effective_weight(layer.base.module, name).double() - W)
            for name, w in STRENGTHS.items()
            if module in parts[name].adapter.layers
        )
        check_close(weft.effective_weight(layer.base.module, "both").double(), U, dtype)
        ranks = [p.adapter.ranks.get(module, 0) for p in parts.values()]
        assert layer.rank == min(sum(ranks), *layer.shape) or "Ada" in variant or "pissa" in variant
        assert layer.rank <= min(layer.shape)


def test_it_is_an_adapter_like_any_other(tmp_path):
    """It saves, loads, merges, trains, and outlives its parts."""
    model, parts = three("DoRA", dtype=torch.float32)
    x = parts["a"].x
    with torch.no_grad(), weft.use(model, None):
        base = model(x)
    both = weft.combine(model, {"a": 0.5, "c": -2}, name="both")
    assert list(both.layers) == ["layer", "mid"] and both.ranks == {"layer": 3, "mid": 6}
    for name in "abc":
        weft.detach(model, name)
    with torch.no_grad():
        wanted = model(x)
    weft.save(model, tmp_path, name="both")
    again = net()
    loaded = weft.load(again, tmp_path)
    assert loaded.config == both.config
    with torch.no_grad():
        assert same_bits(again(x), wanted)
    weft.merge(model, "both", verify=x)
    weft.unmerge(model)
    before = weft.snapshot(model)
    optimizer = torch.optim.SGD(both.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    weft.audit(model, before, weft.snapshot(model), "both")
    weft.detach(model, "both")
    with torch.no_grad():
        assert same_bits(model(x), base)


def test_a_factor_in_bfloat16_is_summed_in_float32():
    model = net()
    a = awake("LoRA", model=model, name="a", held="bfloat16")
    both = weft.combine(model, {"a": 1 / 3}, name="third")
    assert both.config.dtype == "float32" and a.config.dtype == "bfloat16"


def test_a_sum_that_is_no_such_adapter_is_refused_with_the_measured_error():
    """c = 0 where σ = 2 at strength -1: nothing of W is left in that row, and DoRA always has some."""
    model = net(dtype=torch.float64)
    a = awake("DoRA", dtype=torch.float64, model=model, name="a", held="float64")
    layer = a.adapter.layers["mid"]
    with torch.no_grad():
        norm = (layer.base.weight() + layer.factors().delta(torch.float64)).norm(dim=1)
        layer.m.copy_(2 * norm)
    model.zero_grad()
    bits = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(
        weft.UnsupportedError, match=r"'mid' the sum is no DoRA .* differ by \d.*measured"
    ):
        weft.combine(model, {"a": -1.0}, name="b")
    assert list(weft.adapters(model)) == ["a"]
    assert all(same_bits(v, bits[k]) for k, v in model.state_dict().items())
    with weft.use(model, {"a": -1.0}):
        assert model(a.x).isfinite().all()


def test_names_states_and_values_are_checked_first():
    model, _ = three("LoRA")
    with pytest.raises(weft.WeftError, match="already attached"):
        weft.combine(model, {"a": 1}, name="b")
    with pytest.raises(weft.ConfigError, match="adapter name"):
        weft.combine(model, {"a": 1}, name="a b")
    with pytest.raises(weft.ConfigError, match="finite number"):
        weft.combine(model, {"a": float("inf")}, name="d")
    with torch.no_grad():
        weft.adapters(model)["b"].layers["mid"].B[0, 0] = torch.nan
    with pytest.raises(weft.WeftError, match=r"'mid\.B' of adapter 'b' holds NaN"):
        weft.combine(model, {"a": 1, "b": 1}, name="d")
    weft.merge(model, "a")
    with pytest.raises(weft.MergeError, match="is merged"):
        weft.combine(model, {"a": 1}, name="d")


def test_the_base_is_read_even_if_another_adapter_has_its_own_weights_in_place():
    model, _ = three("DoRA")
    wanted = weft.combine(model, {"a": 0.5}, name="first")
    full = weft.attach(model, config("Full"), name="full")
    move(full)
    assert full.is_attached
    found = weft.combine(model, {"a": 0.5}, name="second")
    for module, layer in wanted.layers.items():
        assert same_bits(layer.m, found.layers[module].m)
