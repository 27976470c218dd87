"""init="pissa" and "olora": the output is the base's bit for bit at the start, and the base stays."""

import copy

import pytest
import torch
from torch import nn

import weft
from support import KINDS, awake, check_close, config, inputs, move, net, same_bits
from weft.ops.row_scale import Sources

INITS = ("pissa", "olora")
METHODS = (weft.LoRA, weft.DoRA)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("init", INITS)
def test_the_start_is_the_base_bit_for_bit_and_training_moves_it(init, method, kind, dtype):
    model, x = net(kind, dtype), inputs(kind, dtype=dtype)
    bits = {k: v.clone() for k, v in model.state_dict().items()}
    base = model(x)
    held = "float64" if dtype == torch.float64 else "float32"  # m is exact in the model's dtype
    made = method(r=3, alpha=5, init=init, dropout=0.25, targets=["layer", "mid"], dtype=held)
    adapter = weft.attach(model, made)
    for training in (True, False):
        model.train(training)
        if method is weft.LoRA or dtype != torch.bfloat16:  # DoRA rounds σ (y - bias) + bias there
            assert same_bits(model(x), base)
        check_close(model(x), base, dtype)
    before = weft.snapshot(model)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    weft.audit(model, before, weft.snapshot(model))
    weft.merge(model)
    weft.unmerge(model)
    weft.detach(model)
    assert model.state_dict().keys() == bits.keys()
    assert all(same_bits(v, bits[k]) for k, v in model.state_dict().items())
    assert same_bits(model(x), base)


@pytest.mark.parametrize("alpha", [None, 7])
@pytest.mark.parametrize(("out", "in_"), [(11, 7), (7, 11), (6, 6)])
def test_the_starts_are_those_of_the_papers(out, in_, alpha):
    layer = nn.Linear(in_, out).double()
    W, s = layer.weight.detach(), (alpha or 3) / 3
    for init in INITS:
        model = nn.Sequential(layer)
        made = weft.LoRA(r=3, alpha=alpha, init=init, targets=["0"], dtype="float64")
        p = weft.attach(model, made).layers["0"]
        assert same_bits(p.A, p.A0) and same_bits(p.B, p.B0)
        if init == "pissa":
            U, S, V = torch.linalg.svd(W)
            check_close(s * p.B @ p.A, (U[:, :3] * S[:3]) @ V[:3], torch.float64)
            check_close(p.A.norm(dim=1), p.B.norm(dim=0), torch.float64)
            check_close(p.A.norm(dim=1).square(), S[:3] / s, torch.float64)
        else:
            Q, R = torch.linalg.qr(W)
            check_close(p.B @ p.A, Q[:, :3] @ R[:3], torch.float64)
            check_close(p.B.t() @ p.B, torch.eye(3, dtype=torch.float64), torch.float64)
        weft.detach(model)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_those_of_the_papers_form(method):
    """A residual in the base and s B A beside it have the same gradients."""
    a = awake(f"{method.__name__}:init=pissa", dtype=torch.float64, held="float64")
    layer = a.adapter.layers["mid"]
    f, s = layer.factors(), layer.method.scale
    W = a.base["mid.weight"]
    A, B = (t.detach().clone().requires_grad_() for t in (layer.A, layer.B))
    x = torch.randn(4, 11, dtype=torch.float64)
    V = W - s * layer.B0 @ layer.A0 + s * B @ A
    scale = 1.0 if f.m is None else (f.m / V.norm(dim=1)).detach()[:, None]
    wanted = x @ (scale * V).t() + a.base["mid.bias"]
    found = a.model.mid(x)
    check_close(found, wanted, torch.float64)
    found.square().sum().backward()
    wanted.square().sum().backward()
    check_close(layer.A.grad, A.grad, torch.float64)
    check_close(layer.B.grad, B.grad, torch.float64)


def test_a_dora_norm_is_never_that_of_tensors_which_are_gone():
    """The factors are new tensors in every call, often at the address of the ones before."""
    model = nn.Sequential(nn.Linear(300, 280))  # not small: the norm is kept
    adapter = weft.attach(model, weft.DoRA(r=4, init="pissa", targets=["0"]))
    layer, x = adapter.layers["0"], torch.randn(5, 300)
    first, second = (Sources.of(layer.factors(), model[0].weight, None).all for _ in range(2))
    assert [id(t) for t in first] == [id(t) for t in second]
    with torch.no_grad():
        for training in (False, True):
            model.train(training)
            found = []
            for _ in range(4):
                for tensor in (layer.A, layer.B, layer.A0):  # A0 by hand: nothing of Weft does
                    tensor.mul_(-1.2)
                    found.append((model(x), {k: t.clone() for k, t in layer.stored().items()}))
            for y, stored in found:
                for name, t in layer.stored().items():
                    t.copy_(stored[name])
                W = weft.effective_weight(model[0])
                check_close(y, x @ W.t() + model[0].bias, torch.float32)


def test_a_weight_of_lower_rank_trains_in_all_directions():
    model = nn.Sequential(nn.Linear(8, 6))
    with torch.no_grad():
        model[0].weight.copy_(torch.outer(torch.arange(6.0), torch.ones(8)))
    layer = weft.attach(model, weft.LoRA(r=3, init="pissa", targets=["0"])).layers["0"]
    assert layer.A.isfinite().all() and layer.B.isfinite().all()
    model(torch.randn(4, 8)).square().sum().backward()
    assert (layer.A.grad.norm(dim=1) + layer.B.grad.norm(dim=0) > 0).all()


@pytest.mark.parametrize("init", INITS)
def test_what_has_no_such_start_is_refused_and_the_model_stays(init):
    model = nn.Sequential(nn.Linear(5, 9))
    with pytest.raises(weft.TargetError, match=r"takes r=6 .* of '0' \[9, 5\], which has 5. Lower"):
        weft.attach(model, weft.LoRA(r=6, init=init, targets=["0"]))
    with torch.no_grad():
        model[0].weight[0, 0] = torch.inf
    with pytest.raises(weft.TargetError, match="'0' holds NaN or infinity"):
        weft.attach(model, weft.LoRA(r=2, init=init, targets=["0"]))
    assert not weft.adapters(model) and type(model[0]) is nn.Linear
    with pytest.raises(weft.ConfigError, match=r"one of .*'pissa', 'olora'"):
        weft.LoRA(init="pisa")
    with pytest.raises(weft.ConfigError):
        weft.DyLoRA(init=init)


def test_overrides_set_the_rank_and_the_start_of_one_layer():
    model = net()
    made = config("LoRA", targets={"layer": {"init": "pissa", "r": 2}, "mid": {}})
    adapter = weft.attach(model, made)
    assert set(adapter.layers["layer"].stored()) == {"A", "B", "A0", "B0"}
    assert set(adapter.layers["mid"].stored()) == {"A", "B"}
    move(adapter)
    two = weft.attach(net(), config("LoRA"), name="other")
    assert adapter.num_parameters == two.num_parameters - 1 * (7 + 11)


def test_two_starts_and_the_base_share_one_model():
    """Other adapters and the base see W, not a residual."""
    model, x = net(), inputs("linear")
    base = model(x)
    plain = awake("LoRA", model=model, name="plain")
    wanted = model(x)
    a = awake("LoRA:init=pissa", model=model, name="a")
    awake("DoRA:init=pissa", model=model, name="b")
    with weft.use(model, "plain"):
        assert same_bits(model(x), wanted)
    with weft.use(model, None):
        assert same_bits(model(x), base)
    alone = []
    for i, name in enumerate(["a", None, "b", "plain"]):
        with weft.use(model, name):
            alone.append(model(x[i : i + 1]))
    with weft.use(model, ["a", None, "b", "plain"]):
        check_close(model(x), torch.cat(alone), torch.float32)
    assert plain.adapter.is_attached and a.adapter.is_attached


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("init", INITS)
def test_a_cast_keeps_what_was_learned(init, dtype, tmp_path):
    """The update is the distance from the start, of which a cast rounds no more than its own digits."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 64))
    before = copy.deepcopy(model.state_dict())
    adapter = weft.attach(model, weft.LoRA(r=6, init=init, targets=["0"]))
    layer = adapter.layers["0"]

    def update(layer=layer):
        f = layer.factors()
        return f.s * (f.B.double() @ f.A.double()).detach()

    model.to(dtype)
    assert not bool(update().any()), "what has not been trained changes nothing"
    assert {layer.A0.dtype, layer.B0.dtype} == {torch.float32} and layer.A.dtype == dtype
    model.float()
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(1e-3 * torch.randn_like(p))
    learned = update()
    for to in (dtype, torch.float32, dtype, torch.float64):
        model.to(to)
        assert float((update() - learned).norm() / learned.norm()) < 0.02
        weft.save(model, tmp_path / str(to))
        base = nn.Sequential(nn.Linear(48, 64))
        base.load_state_dict(before)
        stored = weft.load(base, tmp_path / str(to)).layers["0"]
        assert float((update(stored) - learned).norm() / learned.norm()) < 0.02
    x = torch.randn(5, 48, dtype=torch.float64)
    weight = model[0].weight.detach() + update()
    check_close(model(x), x @ weight.t() + model[0].bias, torch.float64)
