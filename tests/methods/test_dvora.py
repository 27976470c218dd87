"""DVoRA is DoRA over VeRA, literally: on rectangles, with A and B untouched, and with 2 out + r
numbers a layer.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import weft
from support import check_close, config, inputs, move, net, same_bits
from weft.methods import DVoRA
from weft.methods.dora import DoRA, Magnitude


def test_there_is_no_third_formula():
    assert issubclass(DVoRA, Magnitude) and issubclass(DoRA, Magnitude)
    own = {
        name for name, value in vars(DVoRA).items() if callable(value) and not name.startswith("__")
    }
    assert own == set(), f"DVoRA computes something itself: {own}"
    assert issubclass(DVoRA, weft.VeRA) and issubclass(DoRA, weft.LoRA)


@given(st.integers(1, 23), st.integers(1, 23), st.integers(1, 17), st.integers(0, 99))
def test_it_is_dora_over_veras_own_effective_weight(in_, out, r, seed):
    """V is what VeRA itself makes of the same W, vectors and seed; then m V / |V|, row by row."""
    torch.manual_seed(seed)
    base = nn.Sequential(nn.Linear(in_, out))
    twin = nn.Sequential(nn.Linear(in_, out))
    twin.load_state_dict(base.state_dict())
    dvora = weft.attach(base, weft.DVoRA(r=r, seed=seed)).sites["0"]
    vera = weft.attach(twin, weft.VeRA(r=r, seed=seed)).sites["0"]
    assert sum(p.numel() for p in dvora.parameters()) == 2 * out + r
    with torch.no_grad():
        for tensor in ("d", "b"):
            getattr(dvora, tensor).normal_()
            getattr(vera, tensor).copy_(getattr(dvora, tensor))
        dvora.m.normal_()
        V = weft.effective_weight(twin[0]).double()
        wanted = dvora.m.double()[:, None] * V / V.norm(dim=1, keepdim=True)
        check_close(weft.effective_weight(base[0]), wanted, torch.float32)
        x = torch.randn(5, in_)
        check_close(base(x), x.double() @ wanted.t() + base[0].bias.double(), torch.float32)
    assert same_bits(dvora.shared.A, vera.shared.A) and same_bits(dvora.shared.B, vera.shared.B)


def test_with_m_at_the_norm_of_v_it_is_vera():
    """The magnitude is the only difference, so with m = |V| the two are one."""
    model, x = net(), inputs("linear")
    dvora = weft.attach(model, config("DVoRA"), name="dvora")
    vera = weft.attach(model, config("VeRA"), name="vera")
    move(vera)
    with torch.no_grad():
        for module, site in dvora.sites.items():
            site.d.copy_(vera.sites[module].d)
            site.b.copy_(vera.sites[module].b)
            site.m.copy_(weft.effective_weight(model.get_submodule(module), "vera").norm(dim=1))
    with weft.use(model, "vera"):
        wanted = model(x)
    with weft.use(model, "dvora"):
        check_close(model(x), wanted, torch.float32)


@pytest.mark.parametrize("value", [0.0, -1.5])
def test_magnitudes_of_zero_and_below_are_what_the_equation_says(value):
    for name in ("DoRA", "DVoRA"):
        model, x = net(), inputs("linear")
        adapter = weft.attach(model, config(name))
        move(adapter)
        with torch.no_grad():
            adapter.sites["layer"].m[3] = value
            full = weft.effective_weight(model.layer)
            assert full[3].norm() == pytest.approx(abs(value), rel=1e-5)
            check_close(model.layer(x), x @ full.t() + model.layer.bias, torch.float32)
        model(x).pow(2).sum().backward()
        assert all(p.grad.isfinite().all() for p in adapter.parameters())
