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


def test_an_adapter_that_made_good_a_loss_is_refused_without_it(tmp_path):
    base, other = BASES["NF4"](), dequantised(BASES["NF4"]())
    weft.attach(base, METHODS["LoRA"])
    weft.loftq(base, dense().state_dict())
    weft.save(base, tmp_path / "a")
    weft.load(BASES["NF4"](), tmp_path / "a")
    for wrong, have in ((dense(), "not quantised"), (BASES["LLM.int8"](), "int8")):
        with pytest.raises(weft.CheckpointError, match=rf"'0' is {have}.*LoftQ.*--quantize"):
            weft.load(wrong, tmp_path / "a")
    with torch.no_grad():
        attached = base.eval()(x := torch.randn(5, 64))
        weft.merge(base)
        assert distance(base(x), attached) < 1e-5
        weft.unmerge(base)
    loaded = weft.load(other, tmp_path / "a", other_base=True)
    assert any("LoftQ" in note for note in loaded.load_report.notes)
    with torch.no_grad():
        assert distance(base.train()(x), other.train()(x)) < 1e-5
    weft.save(other, tmp_path / "b")  # what it is travels on
    with pytest.raises(weft.CheckpointError, match="LoftQ"):
        weft.load(dense(), tmp_path / "b")


def test_weights_of_another_model_or_turned_or_without_its_body_s_name():
    torch.manual_seed(9)
    base = BASES["NF4"]()
    weft.attach(base, METHODS["LoRA"])
    other = {k: torch.randn_like(v) for k, v in dense().state_dict().items()}
    with pytest.raises(weft.CheckpointError, match="other numbers"):
        weft.loftq(base, other)
    base.base_model_prefix = "body"
    turned = {f"body.{k}": v.t() if v.ndim == 2 else v for k, v in dense().state_dict().items()}
    report = weft.loftq(base, turned)
    assert report.after < report.before < 0.2
