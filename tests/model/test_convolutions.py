"""Convolutions under every low-rank method, beside the functional convolution with the oracle's W'."""

import copy
import types

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import bases_record
import weft
from oracle import ORACLES, count
from support import METHODS, RULE_VARIANTS, TURNS_WEIGHTS, config, distance, same_bits
from weft.model import conv_plan
from weft.model.merge import effective_weight
from weft.ops import convolution

LOW_RANK = [v for v in TURNS_WEIGHTS if v in RULE_VARIANTS and not v.startswith("Bottleneck")]
EXACT = 1e-12
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
WAYS = ("beside", "built", "general")


def matrix(layer):
    """W [out, in / groups · k] of a convolution, group by group."""
    w, n = layer.weight.detach().double(), layer.in_channels // layer.groups
    if not layer.transposed:
        return w.reshape(layer.out_channels, -1)
    return torch.cat([part.transpose(0, 1).reshape(-1, n * w[0, 0].numel()) for part in w.split(n)])


def kernel(layer, W):
    """Undoes `matrix`."""
    n = layer.in_channels // layer.groups
    found = W.reshape(W.shape[0], n, *layer.kernel_size)
    if not layer.transposed:
        return found
    return torch.cat([p.transpose(0, 1) for p in found.split(W.shape[0] // layer.groups)])


def functional(layer, x, W, output_padding=None):
    """The convolution as torch's function of the layer's settings and W."""
    dims, w, bias = len(layer.kernel_size), kernel(layer, W), layer.bias
    if layer.transposed:
        f = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dims - 1]
        pad = layer.output_padding if output_padding is None else output_padding
        rest = layer.stride, layer.padding, pad, layer.groups, layer.dilation
        return f(x, w, bias, *rest)
    padding = layer.padding
    if layer.padding_mode != "zeros":
        sides = layer._reversed_padding_repeated_twice
        x, padding = F.pad(x, sides, mode=layer.padding_mode), 0
    f = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    return f(x, w, bias, layer.stride, padding, layer.dilation, layer.groups)


def tensors_of(site):
    own = {k: p.detach().double().requires_grad_() for k, p in site.trainable().items()}
    return own | {k: b.double() for k, b in site.named_buffers() if k not in site.buffer_names}


def attached(layer, variant, **changes):
    """The layer in a model, adapted and moved off its start."""
    model = nn.Sequential(layer)
    site = weft.attach(model, config(variant, targets="conv", **changes)).layers["0"]
    with torch.no_grad():
        for p in site.trainable().values():
            p.add_(0.3 * torch.randn_like(p))
    return model, site


@st.composite
def layers(draw):
    """A convolution of any kind, and an input for it with or without rows."""
    n, transposed = draw(st.integers(1, 3)), draw(st.booleans())
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    in_, out = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    size, stride, dilation = (
        tuple(draw(st.integers(1, most)) for _ in range(n)) for most in (3, 3, 2)
    )
    bias, torch_seed = draw(st.booleans()), draw(st.integers(0, 2**31))
    torch.manual_seed(torch_seed)
    if transposed:
        padding = tuple(draw(st.integers(0, 1)) for _ in range(n))
        output_padding = tuple(
            draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)
        )
        cls = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[n - 1]
        layer = cls(in_, out, size, stride, padding, output_padding, groups, bias, dilation)
    else:
        mode = draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]))
        padding = draw(st.sampled_from(["same", "valid", 1, 2, 0]))
        stride = (1,) * n if padding == "same" else stride
        cls = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[n - 1]
        layer = cls(in_, out, size, stride, padding, dilation, groups, bias, mode)
    rows = draw(st.sampled_from([(), (1,), (3,)]))
    return layer.double(), torch.randn(*rows, in_, *(8 - n,) * n, dtype=torch.float64)


@settings(max_examples=60)
@given(layers(), st.sampled_from(LOW_RANK), st.sampled_from(WAYS), st.data())
def test_output_and_gradients_are_those_of_the_convolution_with_the_new_weight(
    case, variant, way, data
):
    layer, x = case
    smaller = min(matrix(layer).shape)
    changes = {"r": min(3, smaller)} if "pissa" in variant else {}
    model, site = attached(layer, variant, dtype="float64", **changes)
    model.train(data.draw(st.booleans()))
    own, W = tensors_of(site), matrix(layer)
    x = x.requires_grad_()
    wanted = functional(layer, x, ORACLES[variant.partition(":")[0]](W, own, site.method))
    weights = torch.randn_like(wanted)
    trained = list(site.trainable())
    grads = torch.autograd.grad((wanted * weights).sum(), [x, *(own[n] for n in trained)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolution, "builds", lambda *_: way == "built")
        if way == "general":
            patch.setattr(conv_plan.ConvolutionPlan, "_why_not", lambda *_: "a test asks for it")
        y = model(x)
    found = torch.autograd.grad((y * weights).sum(), [x, *map(site.get_parameter, trained)])
    assert distance(y, wanted) <= EXACT
    for name, a, b in zip(["x", *trained], found, grads, strict=True):
        assert float((a - b).abs().max()) <= EXACT * max(1.0, float(b.abs().max())), name


@given(layers(), st.sampled_from(LOW_RANK))
def test_merged_weight_is_the_oracles_and_unmerge_gives_the_bits_back(case, variant):
    layer, x = case
    changes = {"r": min(3, *matrix(layer).shape)} if "pissa" in variant else {}
    before, W = layer.weight.detach().clone(), matrix(layer)
    model, site = attached(layer, variant, dtype="float64", **changes)
    wanted = ORACLES[variant.partition(":")[0]](W, tensors_of(site), site.method).detach()
    with torch.no_grad():
        y = model.eval()(x)
    assert distance(effective_weight(layer), wanted) <= EXACT
    weft.merge(model)
    assert (
        distance(matrix(layer), wanted) <= EXACT
        and distance(effective_weight(layer), wanted) <= EXACT
    )
    assert distance(model(x), y) <= EXACT
    weft.unmerge(model)
    assert same_bits(layer.weight, before)
    weft.detach(model)
    assert type(model[0]) in (*convolution_classes(),) and same_bits(layer.weight, before)


def convolution_classes():
    one = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return (*one, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@pytest.mark.parametrize("variant", LOW_RANK)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_start_is_the_bases_bit_for_bit_and_layout_and_count_stay(variant, dtype, layout):
    for layer in (
        nn.Conv2d(6, 8, 3, 2, 1, groups=2),
        nn.Conv2d(6, 6, 3, groups=6),
        nn.ConvTranspose2d(6, 9, 2),
    ):
        model = nn.Sequential(layer).to(dtype).to(memory_format=layout)
        x = torch.randn(2, 6, 7, 7).to(dtype).to(memory_format=layout)
        with torch.no_grad():
            wanted = model(x)
        changes = {"r": 2} if "pissa" in variant else {}
        adapter = weft.attach(model, config(variant, targets="conv", **changes))
        out, in_ = matrix(layer).shape
        r = adapter.config.r
        name = variant if "pissa" not in variant else variant.partition(":")[0]
        assert adapter.num_parameters == adapter.plan().trainable == count(name, out, in_, r)
        for mode in (True, False):
            model.train(mode)
            y = model(x)
            assert torch.equal(y, wanted) and y.stride() == wanted.stride()
            with torch.no_grad():
                assert torch.equal(model(x), wanted)


@pytest.mark.parametrize("name", ["LoRA", "DoRA", "VeRA", "DVoRA"])
def test_transposed_with_another_output_size(name):
    layer = nn.ConvTranspose2d(4, 6, 3, stride=3, groups=2).double()
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    _, site = attached(layer, name, dtype="float64")
    W = ORACLES[name](matrix(layer), tensors_of(site), site.method)
    wanted = functional(layer, x, W, output_padding=(2, 1))
    for found in (
        layer(x, [17, 16]),
        layer(x, output_size=[17, 16]),
        layer(output_size=[17, 16], input=x),
    ):
        assert distance(found, wanted) <= EXACT


@given(layers(), st.sampled_from(["LoRA", "DoRA", "VeRA", "LoRAFA"]))
def test_dropout_acts_on_the_input_of_the_update_alone(case, name):
    layer, x = case
    model, site = attached(layer, name, dtype="float64", dropout=0.4)
    model.train()
    torch.manual_seed(5)
    y = model(x)
    torch.manual_seed(5)
    dropped = F.dropout(x, 0.4)
    f = site.method.factors(site)
    bias = torch.zeros((), dtype=torch.float64)
    if layer.bias is not None:
        bias = layer.bias.view(-1, *(1,) * len(layer.kernel_size))
    delta = functional(layer, dropped, f.delta(torch.float64)) - bias
    wanted = functional(layer, x, matrix(layer)) + delta
    if f.m is not None:
        sigma = f.m / (matrix(layer) + f.delta(torch.float64)).norm(dim=1)
        wanted = sigma.view(-1, *(1,) * len(layer.kernel_size)) * (wanted - bias) + bias
    assert distance(y, wanted) <= EXACT


class Net(nn.Module):
    """Images [rows, 3, 8, 8] -> [rows, 4]; optionally several images per row, one row after another or
    in turns.
    """

    def __init__(self, images=1, turns=False):
        super().__init__()
        self.images, self.turns = images, turns
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.depth = nn.Conv2d(6, 6, 3, stride=2, padding=1, groups=6)
        self.back = nn.ConvTranspose2d(6, 5, 2, stride=2)
        self.fc = nn.Linear(5, 4)

    def forward(self, x):
        n = len(x)
        x = torch.stack([x * (i + 1) for i in range(self.images)], 0 if self.turns else 1)
        h = torch.tanh(self.stem(x.flatten(0, 1)))
        h = torch.tanh(self.back(torch.tanh(self.depth(h)))).mean((2, 3))
        h = h.view(self.images, n, -1).mean(0) if self.turns else h.view(n, self.images, -1).mean(1)
        return self.fc(h)


def moved(adapter):
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.3 * torch.randn_like(p))


@pytest.mark.parametrize(("images", "turns"), [(1, False), (2, False), (2, True)])
def test_rows_of_one_batch_have_the_adapters_that_they_name(images, turns):
    model, x = Net(images, turns).double(), torch.randn(5, 3, 8, 8, dtype=torch.float64)
    names = ["LoRA", "DoRA", "VeRA", "DVoRA"]
    for name in names:
        moved(weft.attach(model, config(name, targets="conv", dtype="float64"), name=name))
    rows = ["LoRA", None, "DoRA", "VeRA", "DVoRA"]
    for mode in (True, False):
        model.train(mode)
        with weft.use(model, rows):
            mixed = model(x)
        for i, name in enumerate(rows):
            with weft.use(model, name):
                alone = model(x)
            assert distance(mixed[i], alone[i]) <= EXACT
        grads = torch.autograd.grad(
            mixed.square().sum(), model.stem.weft["DoRA"].get_parameter("B")
        )
        assert grads[0].abs().sum() > 0
    strengths = {"LoRA": 0.5, "DoRA": -0.25}
    outs = {}
    for name in (*strengths, None):
        with weft.use(model, name):
            outs[name] = model.stem(x)
    with weft.use(model, strengths):
        found = model.stem(x)
    wanted = outs[None] + sum(s * (outs[n] - outs[None]) for n, s in strengths.items())
    assert distance(found, wanted) <= EXACT


@pytest.mark.parametrize("name", ["LoRA", "DoRA", "VeRA", "DVoRA", "LoRAFA", "AdaLoRA", "DyLoRA"])
def test_two_steps_audit_save_load_merge(name, tmp_path):
    model, fresh = Net(), Net()
    fresh.load_state_dict(model.state_dict())
    adapter = weft.attach(model, config(name, targets="conv"))
    optimizer = torch.optim.AdamW(adapter.parameters(), 0.05)
    x = torch.randn(4, 3, 8, 8)
    before = weft.snapshot(model)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    weft.audit(model, before, weft.snapshot(model))
    model.eval()
    wanted = model(x).detach()
    weft.save(model, tmp_path)
    loaded = weft.load(fresh.eval(), tmp_path)
    assert torch.equal(fresh(x), wanted)
    assert [r.kind for r in loaded.plan().rows] == ["convolution"] * 3
    shown = weft.inspect(tmp_path)
    assert [r.shape for r in shown.rows] == [(6, 27), (6, 9), (5, 24)]
    weft.merge(fresh, verify=x)
    assert distance(fresh(x), wanted) <= 1e-5
    weft.unmerge(fresh)
    assert torch.equal(fresh(x), wanted)


def test_a_norm_follows_the_weight_wherever_it_is_edited():
    for layer in (nn.Conv2d(4, 6, 3), nn.ConvTranspose2d(4, 6, 3)):
        model, site = attached(layer.double(), "DoRA", dtype="float64")
        x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(convolution, "builds", lambda *_: False)
            for edit in (lambda w: w.mul_(2), lambda w: w.data.add_(0.1)):
                model(x)
                with torch.no_grad():
                    edit(layer.weight)
                wanted = functional(
                    layer, x, ORACLES["DoRA"](matrix(layer), tensors_of(site), site.method)
                )
                assert distance(model(x), wanted) <= EXACT


def test_other_dtypes_autocast_and_compiled_code():
    model = Net()
    moved(weft.attach(model, config("DoRA", targets="conv")))
    x = torch.randn(2, 3, 8, 8)
    wanted = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert distance(model(x).float(), wanted) <= 5e-2
    compiled = torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True)
    assert distance(compiled(x), wanted) <= 1e-5
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert distance(half(x.bfloat16()).float(), wanted) <= 5e-2


class Standardised(nn.Conv2d):
    def forward(self, x):
        w = self.weight
        return self._conv_forward(x, (w - w.mean()) / w.std(), self.bias)


class PadsFirst(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(F.pad(x, (0, 1, 0, 1)), weight, bias)


class Counted(nn.Conv2d):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class StandardisedWithin(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, (weight - weight.mean()) / weight.std(), bias)


class Biased(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight + 1, bias)


class Gated(nn.Conv2d):
    def forward(self, x, gate):
        return super().forward(x) * gate


@pytest.mark.parametrize("cls", [Standardised, StandardisedWithin, Biased, Gated])
def test_a_convolution_that_computes_something_else_is_refused_by_name(cls):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), cls(4, 4, 3))
    with pytest.raises(
        weft.TargetError, match=rf"'1'.*forward of {cls.__name__} (comp|is not|fails)"
    ):
        weft.attach(model, weft.LoRA(targets=["1"]))
    adapter = weft.attach(model, weft.LoRA(targets="conv"))
    assert list(adapter.layers) == ["0"]
    assert f"forward of {cls.__name__}" in " ".join(str(adapter.plan()).split())


def tiled(self, x, weight, bias):
    """As interfaces for images without seams put it onto every convolution of a model."""
    x = F.pad(x, (1, 1, 0, 0), mode="circular")
    return F.conv2d(
        F.pad(x, (0, 0, 1, 1)), weight, bias, self.stride, 0, self.dilation, self.groups
    )


@pytest.mark.parametrize("when", ["class", "before", "after"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["LoRA", "DoRA", "VeRA"])
def test_a_padding_of_its_own_counts_for_the_update_too(when, way, name, monkeypatch):
    cls = PadsFirst if when == "class" else nn.Conv2d
    layer, x = cls(4, 4, 3, groups=2).double(), torch.randn(2, 4, 6, 6, dtype=torch.float64)

    def patch():
        layer._conv_forward = types.MethodType(tiled, layer)

    if when == "before":
        patch()
    model, site = attached(layer, name, dtype="float64")
    monkeypatch.setattr(convolution, "builds", lambda *_: way == "built")
    if way == "general":
        monkeypatch.setattr(conv_plan.ConvolutionPlan, "_why_not", lambda *_: "a test asks")
    model(x)
    if when == "after":
        patch()
    W = kernel(layer, ORACLES[name](matrix(layer), tensors_of(site), site.method))
    assert distance(model(x), layer._conv_forward(x, W, layer.bias)) <= EXACT


def test_a_subclass_that_computes_the_same_runs_its_own_forward():
    layer = Counted(3, 4, 3).double()
    model, site = attached(layer, "DoRA", dtype="float64")
    x, before = torch.randn(2, 3, 6, 6, dtype=torch.float64), layer.calls
    wanted = functional(layer, x, ORACLES["DoRA"](matrix(layer), tensors_of(site), site.method))
    assert distance(model(x), wanted) <= EXACT and layer.calls == before + 1


def test_targets():
    model = Net()

    def layers_of(targets, **more):
        found = list(weft.attach(model, weft.LoRA(targets=targets, **more)).layers)
        weft.detach(model)
        return found

    assert layers_of("conv") == ["stem", "depth", "back"]
    assert layers_of(["all-linear", "conv"]) == ["stem", "depth", "back"]  # fc is the head
    assert layers_of(["stem", "fc"]) == ["stem", "fc"]
    assert layers_of("conv", exclude=["depth"]) == ["stem", "back"]
    assert layers_of({"conv": {"r": 2}, "fc": {}}) == ["stem", "depth", "back", "fc"]
    with pytest.raises(weft.TargetError, match=r'finds no layer.*targets="conv" adapts its 3'):
        layers_of("all-linear")
    model.mid, model.more = nn.Linear(2, 2), nn.Conv2d(20, 20, 3)
    with pytest.raises(weft.TargetError, match=r'leaves out 9\d.* %.*convolution 9\d.*"conv"\]'):
        layers_of("all-linear")
    assert layers_of("all-linear", exclude="conv") == ["mid"]
    model.mid = nn.Linear(80, 80)
    with pytest.warns(UserWarning, match=r'leaves out 3\d.*convolution 3\d.*exclude="conv"'):
        adapter = weft.attach(model, weft.LoRA())
    cold = {f.name: f.reason for f in adapter.plan().frozen}
    assert list(adapter.layers) == ["mid"] and cold["stem"].startswith("a convolution")
    weft.detach(model)
    with pytest.raises(weft.TargetError, match=r"'stem' is a convolution.*Bottleneck.*exclude"):
        weft.attach(model, weft.Bottleneck(targets=["stem", "mid"]))
    with pytest.raises(weft.TargetError, match=r"stem.*adapted or trained in full"):
        weft.attach(model, weft.LoRA(targets="conv", train=["stem"]))
    assert not weft.adapters(model) and METHODS


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 6, 3, groups=2), nn.ConvTranspose2d(4, 6, 3)])
def test_sums_and_smaller_ranks_and_starts(layer):
    model, x = nn.Sequential(layer).double(), torch.randn(2, 4, 6, 6, dtype=torch.float64)
    for name in ("LoRA", "DoRA"):
        made = config(name, targets="conv", dtype="float64")
        moved(weft.attach(model, made, name=name))
    W, outs = matrix(layer), {}
    for name in ("LoRA", "DoRA"):
        outs[name] = effective_weight(layer, name)
    weft.combine(model, {"LoRA": 0.5, "DoRA": 2.0}, "sum")
    wanted = W + 0.5 * (outs["LoRA"] - W) + 2.0 * (outs["DoRA"] - W)
    assert distance(effective_weight(layer, "sum"), wanted) <= 1e-6
    adapter = weft.attach(model, weft.DyLoRA(r=3, targets="conv", dtype="float64"), name="nested")
    moved(adapter)
    full = tensors_of(adapter.layers["0"])
    adapter.truncate(2)
    weft.use(model, "nested")
    model.eval()
    small = W + (full["B"][:, :2] @ full["A"][:2])
    assert distance(model(x), functional(layer, x, small)) <= EXACT


def test_recomputed_activations_have_the_same_gradients():
    from torch.utils.checkpoint import checkpoint

    for name in ("LoRA", "DoRA", "LoRAFA"):
        model = Net().double()
        moved(weft.attach(model, config(name, targets="conv", dtype="float64", dropout=0.3)))
        x, found = torch.randn(2, 3, 8, 8, dtype=torch.float64), []
        for reentrant in (None, False, True):
            torch.manual_seed(3)
            y = x.clone().requires_grad_()
            out = model(y) if reentrant is None else checkpoint(model, y, use_reentrant=reentrant)
            out.square().sum().backward()
            found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
            model.zero_grad()
        for other in found[1:]:
            assert all(distance(a, b) <= EXACT for a, b in zip(other, found[0], strict=True))


class Labelled(torch.Tensor):
    """A tensor class of another library."""


def test_kernels_of_another_class_are_refused_by_name():
    layer = nn.Conv2d(3, 4, 3)
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Labelled))
    with pytest.raises(weft.TargetError, match=r"its weight is packed \(Labelled\)"):
        weft.attach(nn.Sequential(layer), weft.LoRA(targets=["0"]))


def test_packed_kernels_are_refused_by_name():
    quanto = pytest.importorskip("optimum.quanto")
    for weights in (quanto.qint8, quanto.qint4, quanto.qfloat8):
        model = nn.Sequential(nn.Conv2d(32, 32, 3), nn.Conv2d(32, 32, 1))
        quanto.quantize(model, weights=weights)
        quanto.freeze(model)
        with pytest.raises(weft.TargetError, match=r"its weight is packed \(WeightQ"):
            weft.attach(model, weft.LoRA(targets=["0"]))
        with pytest.raises(weft.TargetError, match=r"its weight is packed \(WeightQ"):
            weft.attach(model, weft.LoRA(targets="conv"))


BASES = {
    "Conv1d": lambda: (nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
    "Conv2d": lambda: (
        nn.Conv2d(4, 6, (3, 2), padding="same", padding_mode="reflect"),
        (2, 4, 6, 6),
    ),
    "Conv2d, groups and dilation": lambda: (nn.Conv2d(4, 6, 3, dilation=2, groups=2), (2, 4, 7, 7)),
    "Conv2d, depthwise": lambda: (nn.Conv2d(4, 8, 3, groups=4), (2, 4, 6, 6)),
    "Conv3d": lambda: (nn.Conv3d(2, 3, 2), (2, 2, 4, 4, 4)),
    "ConvTranspose1d": lambda: (nn.ConvTranspose1d(4, 6, 3, 2, output_padding=1), (2, 4, 5)),
    "ConvTranspose2d": lambda: (nn.ConvTranspose2d(4, 6, 3, 2, groups=2), (2, 4, 5, 5)),
    "ConvTranspose3d": lambda: (nn.ConvTranspose3d(2, 3, 2, 2), (2, 2, 3, 3, 3)),
}


@pytest.mark.parametrize("name", ["LoRA", "VeRA", "DoRA", "DVoRA", "LoRAFA", "AdaLoRA", "DyLoRA"])
@pytest.mark.parametrize("base", BASES)
def test_the_table_of_bases(base, name, tmp_path):
    layer, shape = BASES[base]()
    fresh = nn.Sequential(copy.deepcopy(layer).double())
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    model, site = attached(layer.double(), name, dtype="float64")
    own = tensors_of(site)
    wanted = functional(layer, x, ORACLES[name](matrix(layer), own, site.method))
    trained = list(site.trainable())
    grads = torch.autograd.grad(wanted.square().sum(), [x, *(own[n] for n in trained)])
    y = model(x)
    found = torch.autograd.grad(y.square().sum(), [x, *map(site.get_parameter, trained)])
    assert distance(y, wanted) <= EXACT
    assert all(distance(a, b) <= EXACT for a, b in zip(found, grads, strict=True))
    weft.save(model, tmp_path)
    weft.load(fresh, tmp_path)
    assert distance(fresh(x), wanted) <= EXACT
    weft.merge(fresh)
    assert distance(fresh(x), wanted) <= EXACT
    bases_record.exact(base, name)
    bases_record.exact(base, "merge")


def test_layers_and_modules_called_conv_are_named_by_the_word_too():
    class Conformer(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.ModuleDict({"up": nn.Linear(4, 4), "depth": nn.Conv1d(4, 4, 3)})
            self.mix, self.stem = nn.ModuleDict({"conv": nn.Linear(4, 4)}), nn.Conv1d(4, 4, 3)
            self.last = nn.Linear(4, 4)

    def layers_of(**fields):
        return list(weft.attach(Conformer(), weft.LoRA(**fields)).layers)

    assert layers_of(targets="conv") == ["conv.depth", "mix.conv", "stem"]
    assert layers_of(targets=["all-linear", "conv"], exclude="conv") == ["last"]
    assert layers_of(targets=r".*\.conv") == ["mix.conv"]
