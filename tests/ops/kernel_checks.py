"""Triton's kernels against their torch forms: test_kernels.py runs this file under Triton's
interpreter, or on a GPU.
"""

import pytest
import torch

from weft.ops import kernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RELATIVE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def close(found, wanted, dtype):
    assert found.shape == wanted.shape
    gap = (found.double() - wanted.double()).abs().max() / wanted.double().abs().max().clamp_min(
        1e-30
    )
    assert float(gap) <= RELATIVE[dtype], float(gap)


@pytest.mark.parametrize("dtype", RELATIVE, ids=str)
@pytest.mark.parametrize(
    ("rows", "tokens", "out", "r"), [(1, 70, 65, 3), (3, 1, 130, 16), (1, 1, 1, 1), (2, 17, 64, 70)]
)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("sigma", [True, False], ids=["scaled", "unscaled"])
@pytest.mark.parametrize("many", [True, False], ids=["many", "one"])
def test_compose_up(dtype, rows, tokens, out, r, bias, sigma, many):
    k = 4 if many else 1
    y, h = draw(rows, tokens, out, dtype=dtype), draw(rows, tokens, r, dtype=dtype, seed=1)
    B, m = draw(k, out, r, dtype=dtype, seed=2), draw(k, out, seed=3) if sigma else None
    b = draw(out, dtype=dtype, seed=4) if bias else None
    index = torch.tensor([3, 1, 2][:rows], device=DEVICE) if many else None
    which = index if many else torch.zeros(rows, dtype=torch.long, device=DEVICE)
    value = y.double() + 0.7 * torch.bmm(h.double(), B.double()[which].mT)
    if m is not None:
        straight = value if b is None else value - b.double()
        value = value + (m.double()[which][:, None] - 1) * straight
    found = kernels.compose_up(
        y, h, B if many else B[0], 0.7, m if many or m is None else m[0], b, index
    )
    assert found is y
    close(found, value, dtype)


@pytest.mark.parametrize("dtype", RELATIVE, ids=str)
@pytest.mark.parametrize(("tokens", "out"), [(70, 65), (1, 130), (64, 64), (200, 3), (0, 5)])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
def test_compose_grad(dtype, tokens, out, bias):
    g, y, sigma = (
        draw(tokens, out, dtype=dtype),
        draw(tokens, out, dtype=dtype, seed=1),
        draw(out, seed=2),
    )
    b = draw(out, dtype=dtype, seed=3) if bias else None
    scaled, sums = kernels.compose_grad(g, y, sigma, b)
    z = y.double() - (b.double() if bias else 0)
    close(sums, (g.double() * z).sum(0), torch.float32)
    if tokens:
        close(scaled, sigma.double() * g.double(), dtype)


def test_a_scale_of_one_and_no_update_leave_every_bit():
    y = draw(1, 9, 33, dtype=torch.float32)
    before = y.clone()
    B, ones = torch.zeros(33, 4, device=DEVICE), torch.ones(33, device=DEVICE)
    kernels.compose_up(y, draw(1, 9, 4), B, 1.0, ones, draw(33), None)
    assert torch.equal(y, before)


@pytest.mark.parametrize("method", ["DoRA", "LoRA"])
def test_a_model_gives_the_same_with_and_without_kernels(method, monkeypatch):
    from support import awake

    a, found = awake(method), []
    for off in ("1", "0"):
        monkeypatch.setenv("WEFT_TRITON", off)
        a.model.zero_grad()
        out = a.run()
        out.pow(2).sum().backward()
        found.append([out.detach(), *(p.grad.clone() for p in a.adapter.parameters())])
    for ours, plain in zip(*found, strict=True):
        close(ours, plain, torch.float32)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
def test_a_mixed_batch_gives_the_same_with_and_without_kernels(bias, monkeypatch):
    import weft
    from support import awake, config

    a = awake("DoRA", bias=bias)
    weft.attach(a.model, config("LoRA"), name="second")
    with torch.no_grad():
        for site in (a.model.layer, a.model.mid):
            site.weft["second"].B.normal_()
    calls, found = [], []
    run = kernels.compose_up
    monkeypatch.setattr(
        kernels, "compose_up", lambda *args: calls.append(len(args[0])) or run(*args)
    )
    names = ["second", "default", None, "second", "default"][: a.x.shape[0]]
    for off in ("1", "0"):
        monkeypatch.setenv("WEFT_TRITON", off)
        with torch.no_grad(), weft.use(a.model, names):
            found.append(a.run())
    close(found[0], found[1], torch.float32)
    assert (
        len(calls) >= 2 and max(calls) < a.x.shape[0]
    )  # the kernel ran, on the adapters' rows alone
