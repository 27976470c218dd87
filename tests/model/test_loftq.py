"""LoftQ's start: nearer to the weights before quantisation, and the same adapter everywhere else."""

import pytest
import torch
from safetensors.torch import save_file
from test_packed import BASES, dense, dequantised, distance

import weft

TARGETS = ["0", "2"]
METHODS = {"LoRA": weft.LoRA(r=8, targets=TARGETS), "DoRA": weft.DoRA(r=8, targets=TARGETS)}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["NF4", "LLM.int8", "quanto int4", "HQQ"])
def test_the_start_is_nearer_to_the_weights_before(kind, method, tmp_path):
    base, before = BASES[kind]().train(), dense()
    save_file(before.state_dict(), tmp_path / "model.safetensors")
    other = dequantised(base)
    x = torch.randn(64, 64)
    with torch.no_grad():
        wanted, plain = before(x), distance(base(x), before(x))
    adapter = weft.attach(base, METHODS[method])
    report = weft.loftq(base, tmp_path)
    lost = [(before[int(n)].weight - other[int(n)].weight).detach() for n in TARGETS]
    size = sum(before[int(n)].weight.detach().square().sum() for n in TARGETS)
    left = [torch.linalg.svdvals(R)[8:].square().sum() for R in lost]  # Eckart and Young
    assert report.layers == 2
    assert report.before == pytest.approx(
        float((sum(R.square().sum() for R in lost) / size).sqrt()), rel=1e-3
    )
    assert report.after == pytest.approx(float((sum(left) / size).sqrt()), rel=1e-2)
    assert report.after < report.before
    with torch.no_grad():
        assert distance(base(x), wanted) < plain
    twin = weft.attach(other, METHODS[method])
    with torch.no_grad():
        for p, q in zip(twin.parameters(), adapter.parameters(), strict=True):
            p.copy_(q)
        assert distance(base(x), other(x)) < 1e-5
    if method == "DoRA":  # at the start W' = Q + s B A
        layer = other[0]
        f = next(iter(twin.layers.values())).factors()
        assert distance(weft.effective_weight(layer), layer.weight + f.s * f.B @ f.A) < 1e-6


def test_what_loftq_cannot_start_is_named():
    model = dense()
    weft.attach(model, METHODS["LoRA"])
    with pytest.raises(weft.UnsupportedError, match="no quantised layer"):
        weft.loftq(model, dense().state_dict())
    base = BASES["NF4"]()
    adapter = weft.attach(base, METHODS["LoRA"])
    with pytest.raises(weft.CheckpointError, match=r"no tensor '0\.weight'"):
        weft.loftq(base, {})
    with pytest.raises(weft.CheckpointError, match="before it was quantised"):
        weft.loftq(base, {"0.weight": torch.ones(3, 3)})
    with pytest.raises(weft.CheckpointError, match=r"no \.safetensors file"):
        weft.loftq(base, "nowhere")
    assert not any(bool(p.any()) for n, p in adapter.named_parameters() if n.endswith("B"))
    weft.loftq(base, dense().state_dict())
    with pytest.raises(weft.WeftError, match="has been trained or loaded"):
        weft.loftq(base, dense().state_dict())
    other = BASES["NF4"]()
    weft.attach(other, weft.VeRA(r=4, targets=TARGETS))
    with pytest.raises(weft.UnsupportedError, match="VeRA has others"):
        weft.loftq(other, dense().state_dict())
