"""The fused function of a layer against its equation in float64, on every path through it."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd.graph import saved_tensors_hooks

from weft.ops import native, plan
from weft.ops import norm as norms
from weft.ops.fused import fused
from weft.ops.low_rank import LowRank
from weft.ops.row_scale import RowScale, output_tells

PATHS = [(False, False), (True, False), (False, True), (True, True)]
LIMIT = {torch.float64: 1e-10, torch.float32: 1e-5}


def definition(x, W, bias, f):
    """y = x W'ᵀ + bias in the dtype of its arguments."""
    B = f.B if f.d is None else f.B * f.d
    B = B if f.b is None else B * f.b[:, None]
    V = W + f.s * (B @ f.A)
    V = V if f.m is None else (f.m / norm_of(f.m))[:, None] * V
    return x @ V.t() + (0 if bias is None else bias)


def tensors(f):
    return {n: t for n in ("A", "B", "d", "b", "m") if (t := getattr(f, n)) is not None}


def norm_of(m):
    """A made-up ‖V‖ [out], a constant."""
    return torch.linspace(0.5, 2, len(m), dtype=m.dtype)


def ours(x, W, bias, f, tells=True):
    """The function under test, as a layer calls it."""
    build = plan.builds(x, W, len(f.A), f.m is not None)
    if f.m is None:
        return fused(x, W, bias, f, build=build)
    norm = norm_of(f.m)
    scale = RowScale(f.m, norm, bias, x.dtype)
    scale.output_tells = tells
    return fused(x, W, bias, f, scale, build=build)


def wide(t):
    return None if t is None else t.detach().double().requires_grad_(t.requires_grad)


def case(seed, lead, out, in_, r, method, dtype, bias=True, transposed=False):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape, trains=True, scale=1.0):
        t = (torch.randn(*shape, generator=g, dtype=torch.float64) * scale).to(dtype)
        return t.requires_grad_(trains)

    x = draw(*lead, in_)
    W = (
        draw(in_, out, trains=False, scale=0.4).t()
        if transposed
        else draw(out, in_, trains=False, scale=0.4)
    )
    f = LowRank(
        draw(r, in_, trains=method not in ("VeRA", "LoRAFA", "DVoRA")),
        draw(out, r, trains="VoRA" not in method),
        s=0.7,
    )
    if method in ("VeRA", "DVoRA"):
        f = replace(f, B=f.B.detach(), d=draw(r), b=draw(out), s=1.0)
    if method in ("DoRA", "DVoRA"):
        f = replace(f, m=draw(out))
    return x, W, draw(out, trains=False) if bias else None, f


def run(function, x, W, bias, f, upstream):
    leaves = {"x": x, **tensors(f)}
    y = function(x, W, bias, f)
    y.backward(upstream.to(y.dtype))
    return {"y": y.detach(), **{n: t.grad for n, t in leaves.items() if t.requires_grad}}


def against_float64(x, W, bias, f, tells=True):
    upstream = torch.randn(
        *x.shape[:-1], W.shape[0], generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    found = run(lambda *args: ours(*args, tells), x, W, bias, f, upstream)
    exact = replace(f, **{n: wide(t) for n, t in tensors(f).items()})
    wanted = run(definition, wide(x), wide(W), wide(bias), exact, upstream)
    assert found.keys() == wanted.keys()
    return {n: gap(found[n], wanted[n]) for n in wanted}


def gap(found, wanted):
    assert found.shape == wanted.shape
    return (
        float((found.double() - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))
        if wanted.numel()
        else 0.0
    )


@pytest.fixture(params=PATHS, ids=["beside", "build", "back", "build-back"])
def path(request, monkeypatch):
    build, back = request.param
    monkeypatch.setattr(plan, "build_forward", lambda *a: build)
    monkeypatch.setattr(plan, "build_backward", lambda *a: back)
    return request.param


@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("method", ["LoRA", "DoRA", "VeRA", "DVoRA", "LoRAFA"])
def test_every_path_is_the_equation(method, dtype, bias, transposed, path):
    gaps = against_float64(*case(3, (2, 9), 11, 7, 3, method, dtype, bias, transposed))
    assert max(gaps.values()) <= LIMIT[dtype], gaps


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 5), max_size=3),
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 9),
    st.sampled_from(["LoRA", "DoRA", "VeRA", "DVoRA", "LoRAFA"]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 99),
)
def test_any_shape_is_the_equation(lead, out, in_, r, method, bias, transposed, seed):
    x, W, b, f = case(seed, lead, out, in_, r, method, torch.float64, bias, transposed)
    gaps = against_float64(x, W, b, f)
    assert max(gaps.values()) <= 1e-9, gaps


@pytest.mark.parametrize("tells", [True, False], ids=["output", "straight"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
def test_magnitudes_of_zero_and_below(bias, tells):
    x, W, b, f = case(5, (6,), 8, 5, 2, "DoRA", torch.float32, bias)
    with torch.no_grad():
        f.m[0], f.m[1] = -2.0, 1.0 if tells else 0.0
    gaps = against_float64(x, W, b, f, tells)
    assert max(gaps.values()) <= 1e-5, gaps


def test_the_output_is_not_asked_for_what_it_has_lost():
    norm, dtype = torch.full((3,), 2.0), torch.float32
    tells = lambda m, bias, dtype=dtype: output_tells(torch.tensor(m), norm, bias, dtype)  # noqa: E731
    assert tells([2.0, -2.0, 0.1], None)
    assert not tells([2.0, 0.0, 2.0], None)
    assert not tells([2.0, 1e-4, 2.0], None)
    assert tells([2.0, 2.0, 2.0], torch.tensor([0.0, -1.9, 1.0]))
    assert not tells([2.0, 2.0, 2.0], torch.tensor([0.0, -2.1, 1.0]))
    assert not tells([2.0, 2.0, 2.0], None, torch.float16)


@pytest.mark.parametrize("stride", ["columns", "rows", "expanded"])
def test_inputs_and_gradients_of_any_layout(stride, path):
    x, W, b, f = case(4, (6, 5), 9, 7, 2, "DoRA", torch.float32)
    base = torch.randn(6, 5, 14)
    x = {
        "columns": base[..., ::2],
        "rows": torch.randn(5, 6, 7).transpose(0, 1),
        "expanded": torch.randn(1, 5, 7).expand(6, 5, 7),
    }[stride].detach()
    own = x.clone().requires_grad_()
    y, z = ours(x.requires_grad_(), W, b, f), ours(own, W, b, f)
    y.sum().backward()  # its gradient is an expanded one
    z.backward(torch.ones_like(z))
    assert torch.allclose(y, z) and torch.allclose(x.grad, own.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("method", ["LoRA", "DoRA", "VeRA", "DVoRA"])
def test_bfloat16_is_no_worse_than_the_plain_path(method, bias):
    """Mean distance from the same bfloat16 numbers' equation in float64, over seeds."""
    found_ours, plain = {}, {}
    for seed in range(6):
        x, W, b, f = case(seed, (64,), 48, 40, 4, method, torch.bfloat16, bias)
        if f.m is not None:
            with torch.no_grad():
                f.m.mul_(0.1).add_(norm_of(f.m))
        f = replace(
            f,
            **{
                n: t.detach().float().requires_grad_(t.requires_grad) for n, t in tensors(f).items()
            },
        )
        upstream = torch.randn(
            64, 48, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        exact = {n: wide(t) for n, t in tensors(f).items()}
        wanted = run(definition, wide(x), wide(W), wide(b), replace(f, **exact), upstream)
        for found, function in ((found_ours, ours), (plain, plainly)):
            for t in (x, *tensors(f).values()):
                t.grad = None
            for name, value in run(function, x, W, b, f, upstream).items():
                found[name] = found.get(name, 0.0) + float(
                    (value.double() - wanted[name]).norm() / wanted[name].norm()
                )
    assert all(found_ours[n] <= 1.15 * plain[n] for n in plain), (found_ours, plain)


def plainly(x, W, bias, f):
    """The same in torch's own operations."""
    y = torch.nn.functional.linear(x, W, bias)
    h = torch.nn.functional.linear(x, f.A.to(x.dtype))
    return native.adapted(y, h, bias, f, None if f.m is None else norm_of(f.m))


def test_a_small_update_survives_bfloat16():
    """W' in bfloat16 would be W: no path may build it there."""
    x, W, _, f = case(1, (4000,), 8, 8, 2, "LoRA", torch.bfloat16, False)
    with torch.no_grad():
        f.B.fill_(1e-4)
    W = torch.ones_like(W)
    moved = ours(x, W, None, f) - torch.nn.functional.linear(x, W)
    wanted = f.s * (x.float() @ f.A.float().t()) @ f.B.float().t()
    big = wanted.abs() > 1e-3 * (x.float() @ W.float().t()).abs().clamp_min(1e-2)
    assert plan.build_forward(4000, 8, 8, 2, False) and plan.build_backward(
        4000, 8, 8, 2, False, True
    )
    assert bool(big.any()) and bool((moved.float()[big] != 0).any())


@pytest.mark.parametrize(
    ("method", "kept"),
    [("LoRA", "x h"), ("DoRA", "x h y"), ("VeRA", "h"), ("DVoRA", "h y"), ("LoRAFA", "h")],
)
def test_what_is_kept_for_backward(method, kept, path):
    """By storage, beyond the tensors that were there before and the small ones: only what the
    docstring says.
    """
    x, W, b, f = case(2, (50, 10), 40, 30, 2, method, torch.float32)
    before = {t.untyped_storage().data_ptr() for t in (W, b, *tensors(f).values())}
    found = {}
    with saved_tensors_hooks(
        lambda t: found.setdefault(t.untyped_storage().data_ptr(), t) is None or t, lambda t: t
    ):
        y = ours(x, W, b, f)
    sizes = {"x": x.numel(), "h": 500 * 2, "y": y.numel()}
    big = sorted(t.numel() for p, t in found.items() if p not in before and t.numel() > 40 * 2)
    assert big == sorted(sizes[name] for name in kept.split())


def test_a_second_derivative_is_refused_and_not_wrong():
    x, W, b, f = case(2, (5,), 4, 3, 2, "LoRA", torch.float64)
    (g,) = torch.autograd.grad(ours(x, W, b, f).pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()


def test_the_cost_model_turns_where_the_counts_do():
    shape = {"out": 768, "in_": 768, "r": 16}
    builds = [plan.build_forward(t, **shape, scaled=False) for t in (1, 128, 700, 1024, 4096)]
    assert builds == sorted(builds) and not builds[1] and builds[-1]
    back = [
        plan.build_backward(t, **shape, scaled=True, small_gradient=True)
        for t in (1, 128, 700, 1024, 4096)
    ]
    assert back == sorted(back) and not back[1] and back[-1]
    # r multiply-adds a number: with a large r the pass counts for nothing, and the sides cross at
    # tokens = in
    assert not plan.build_forward(1000, 2000, 1024, 4096, False) and plan.build_forward(
        1048, 2000, 1024, 4096, False
    )


def _exact(W, A, B):
    return (W.double() + B.double() @ A.double()).norm(dim=1)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 20),
    st.integers(1, 20),
    st.integers(1, 6),
    st.sampled_from([0.0, 1e-6, 1.0, 1e6]),
    st.integers(0, 99),
)
def test_the_norm_without_the_product_is_the_norm(out, in_, r, size, seed):
    g = torch.Generator().manual_seed(seed)
    W, A, B = (
        torch.randn(out, in_, generator=g),
        torch.randn(r, in_, generator=g),
        torch.randn(out, r, generator=g) * size,
    )
    found = norms.updated_norm(W, norms.row_norm(W), A, B)
    rounding = 1e-6 * (B.abs() @ A.abs()).norm(dim=1)  # of B A itself in float32
    assert ((found - _exact(W, A, B)).abs() <= 1e-5 * _exact(W, A, B) + rounding).all()
    if size == 0.0:
        assert torch.equal(found, norms.row_norm(W))


@pytest.mark.parametrize("left", [0.0, 1e-7, 1e-4, 0.1])
def test_the_norm_holds_where_update_and_weight_cancel(left):
    torch.manual_seed(0)
    A, B = torch.randn(2, 9), torch.randn(5, 2)
    W = -(B @ A) + left * torch.randn(5, 9)
    W[0] = 0
    found = norms.updated_norm(W, norms.row_norm(W), A, B)
    rounding = 1e-6 * (B @ A).norm(dim=1)  # of the sum itself in float32
    assert ((found - _exact(W, A, B)).abs() <= 1e-5 * _exact(W, A, B) + rounding).all()


def test_a_zero_row_stays_zero():
    W, A, B = torch.randn(4, 6), torch.randn(2, 6), torch.randn(4, 2)
    W[1], B[1] = 0, 0
    assert norms.updated_norm(W, norms.row_norm(W), A, B)[1] == norms.SMALLEST


def test_the_product_needs_no_wide_copy_of_w(monkeypatch):
    monkeypatch.setattr(norms, "_BLOCK", 12)
    W, A = torch.randn(7, 4).bfloat16(), torch.randn(3, 4)
    assert torch.allclose(norms.product(W, A, torch.float32), W.float() @ A.t())
