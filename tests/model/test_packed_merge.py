"""Merging into packed layers: dense layers with W', or codes of W', and the packed layers back again."""

import copy
import pickle

import pytest
import torch
from safetensors import safe_open
from test_packed import BASES, METHODS, dequantised, distance, moved, package
from torch import nn

import bases_record
import weft
from weft.model import packings
from weft.model.packed_merge import dequantise

X = torch.linspace(-1, 1, 320).view(5, 64)


@pytest.fixture(params=BASES)
def kind(request):
    return request.param


def output(model):
    with torch.no_grad():
        return model.eval()(X)


def bits(model):
    """Everything that a layer's class, tensors and attributes are, by identity and value."""
    found = {}
    for name, m in model.named_modules():
        own = {k: id(v) for k, v in m.__dict__.items() if not k.startswith("_")}
        packing = packings.packing_of(m)
        codes = () if packing is None else packing.tensors(m)
        found[name] = (id(m), type(m), own, [c.clone() for c in codes], set(m._parameters))
    return found


def same(a, b):
    return all(
        x[:3] == y[:3]
        and x[4] == y[4]
        and all(torch.equal(c, d) for c, d in zip(x[3], y[3], strict=True))
        for x, y in ((a[k], b[k]) for k in a)
    )


@pytest.mark.parametrize("method", ["LoRA", "DoRA", "DVoRA"])
def test_merged_layers_are_dense_and_unmerged_ones_the_packed_ones_bit_for_bit(kind, method):
    base = BASES[kind]()
    other = dequantised(base)
    adapter = weft.attach(base, METHODS[method])
    twin = weft.attach(other, METHODS[method])
    moved(adapter), moved(twin)
    attached, before = output(base), bits(base)
    wanted = weft.effective_weight(base[0])
    report = weft.merge(base, verify=X)
    weft.merge(other)
    assert report.packed == report.weights == 2 and report.dtype == torch.float32
    assert "are dense now, in float32" in str(report)
    for i in (0, 2):
        assert isinstance(base[i], nn.Linear) and packings.packing_of(base[i]) is None
        assert distance(base[i].weight, other[i].weight) < 1e-6
    assert set(base.state_dict()) >= {"0.weight", "0.bias", "2.weight"}
    assert distance(output(base), output(other)) < 1e-6
    assert torch.equal(weft.effective_weight(base[0]), wanted)  # of the packed weight
    weft.unmerge(base)
    assert same(bits(base), before)
    assert torch.equal(output(base), attached)
    if method == "LoRA":
        bases_record.exact(kind, "merge", package(kind))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_dense_dtype_can_be_chosen(dtype):
    base = BASES["NF4"]()
    moved(weft.attach(base, METHODS["LoRA"]))
    report = weft.merge(base, dtype=dtype)
    assert report.dtype == base[0].weight.dtype == base[0].bias.dtype == dtype
    weft.detach(base, keep_merged=True)
    assert type(base[0]) is nn.Linear and base.to(dtype)(X.to(dtype)).dtype == dtype


def test_kept_layers_are_plain_and_other_adapters_go_on_over_them(kind):
    base = BASES[kind]()
    moved(weft.attach(base, METHODS["LoRA"]))
    b = weft.attach(base, METHODS["DoRA"], name="b")
    moved(b)
    weft.merge(base, "default")
    weights = [base[i].weight.detach().clone() for i in (0, 2)]
    weft.detach(base, "default", keep_merged=True)
    weft.use(base, "b")
    found = output(base)
    twin = dequantised(BASES[kind]())
    with torch.no_grad():
        twin[0].weight.copy_(weights[0]), twin[2].weight.copy_(weights[1])
    other = weft.attach(twin, METHODS["DoRA"])
    with torch.no_grad():
        for p, q in zip(other.parameters(), b.parameters(), strict=True):
            p.copy_(q)
    assert distance(found, output(twin)) < 1e-6
    weft.detach(base, "b")
    for i in (0, 2):
        assert isinstance(base[i], nn.Linear) and not any(
            k.startswith("_weft") for k in vars(base[i])
        )
        assert type(base[i]).__name__ == "Linear"
        assert torch.equal(copy.deepcopy(base)[i].weight, weights[i // 2])
    assert type(copy.deepcopy(base)[0]) is nn.Linear


def test_a_copy_of_a_merged_model_is_unmerged_on_its_own():
    base = BASES["NF4"]()
    moved(weft.attach(base, METHODS["LoRA"]))
    attached = output(base)
    weft.merge(base)
    twin = pickle.loads(pickle.dumps(base))  # noqa: S301
    merged = output(base)
    weft.unmerge(twin)
    assert torch.equal(output(twin), attached) and torch.equal(output(base), merged)
    weft.unmerge(base)
    assert torch.equal(output(base), attached)


def test_a_file_saved_while_merged_is_the_one_saved_before(kind, tmp_path):
    base = BASES[kind]()
    moved(weft.attach(base, METHODS["DoRA"]))
    weft.save(base, tmp_path / "before")
    weft.merge(base)
    weft.save(base, tmp_path / "merged")
    files = [tmp_path / n / "adapter_model.safetensors" for n in ("before", "merged")]
    heads = []
    for file in files:
        with safe_open(file, "pt") as opened:
            heads.append(opened.metadata())
    assert heads[0] == heads[1]


def test_an_edit_of_a_merged_weight_is_found():
    base = BASES["NF4"]()
    moved(weft.attach(base, METHODS["LoRA"]))
    weft.merge(base)
    base[0].weight.data[0, 0] += 1
    with pytest.raises(weft.MergeError, match=r"'0\.weight' was edited through"):
        weft.unmerge(base)


def grown(base, share):
    """An adapter whose change is this share of ‖W‖ in every layer."""
    adapter = weft.attach(base, METHODS["LoRA"])
    moved(adapter)
    with torch.no_grad():
        for i in (0, 2):
            W = packings.packing_of(base[i]).weight(base[i]).float()
            size = (weft.effective_weight(base[i]) - W).norm() / W.norm()
            base[i].weft["default"].B.mul_(share / size)


def test_what_survives_being_packed_again_is_reported(kind):
    base = BASES[kind]()
    grown(base, 0.5)
    attached, before = output(base), bits(base)
    changes = {i: weft.effective_weight(base[i]).double() for i in (0, 2)}
    old = {i: packings.packing_of(base[i]).weight(base[i]).double() for i in (0, 2)}
    report = weft.merge(base, requantise=True, verify=X)
    kept = size = 0.0
    for i in (0, 2):
        packing = packings.packing_of(base[i])
        assert packing is not None and before[str(i)][1] is type(base[i])
        change = changes[i] - old[i]
        kept += float(((packing.weight(base[i]).double() - old[i]) * change).sum())
        size += float(change.square().sum())
    assert report.survived == pytest.approx(kept / size, rel=1e-6) and report.survived > 0.8
    assert report.dtype is None and "survived" in str(report)
    assert distance(output(base), attached) < 0.5
    weft.unmerge(base)
    assert same(bits(base), before)
    assert torch.equal(output(base), attached)
    bases_record.exact(kind, "requantise", package(kind))


@pytest.mark.parametrize("kind", ["NF4"], indirect=True)
def test_a_change_that_packing_would_lose_is_refused_with_its_share(kind):
    base = BASES[kind]()
    grown(base, 0.02)
    attached, before = output(base), bits(base)
    with pytest.raises(weft.MergeError, match=r"change, (\d\.?\d*) % would survive.*NF4.*dense"):
        weft.merge(base, requantise=True)
    assert same(bits(base), before) and torch.equal(output(base), attached)
    weft.merge(base)  # dense is always possible


def test_what_cannot_be_asked_for_is_named():
    model = nn.Sequential(nn.Linear(8, 8))
    weft.attach(model, weft.LoRA(r=2, targets=["0"]))
    for asked in ({"dtype": torch.float32}, {"requantise": True}):
        with pytest.raises(weft.UnsupportedError, match="is for quantised layers"):
            weft.merge(model, **asked)
    base = BASES["NF4"]()
    weft.attach(base, METHODS["LoRA"])
    with pytest.raises(weft.UnsupportedError, match="is one of"):
        weft.merge(base, dtype=torch.int8)
    with pytest.raises(weft.UnsupportedError, match="requantise=True makes none"):
        weft.merge(base, dtype=torch.float32, requantise=True)


def test_every_packed_layer_can_be_made_dense_for_good(kind):
    base = BASES[kind]()
    other = dequantised(base)
    assert len(dequantise(base, None)) == 1
    assert all(packings.packing_of(m) is None for m in base)
    assert torch.equal(output(base), output(other))
