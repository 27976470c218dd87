"""Methods over quantised bases: at the start the base bit for bit, then the same adapter over the
dequantised base.
"""

import gc
import importlib
import warnings

import pytest
import torch
from torch import nn

import bases_record
import weft
from weft.model import packings
from weft.model.base_layers import packed
from weft.ops.cache import counts

METHODS = {
    "LoRA": weft.LoRA(r=4, targets=["0", "2"]),
    "VeRA": weft.VeRA(r=4, targets=["0", "2"]),
    "DoRA": weft.DoRA(r=4, targets=["0", "2"]),
    "DVoRA": weft.DVoRA(r=4, targets=["0", "2"]),
    "LoRAFA": weft.LoRAFA(r=4, targets=["0", "2"]),
    "AdaLoRA": weft.AdaLoRA(r=4, targets=["0", "2"], total_steps=100),
    "DyLoRA": weft.DyLoRA(r=4, targets=["0", "2"]),
    "LoRA pissa": weft.LoRA(r=4, targets=["0", "2"], init="pissa"),
    "DoRA olora": weft.DoRA(r=4, targets=["0", "2"], init="olora"),
}


def dense():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64, bias=False))


def bitsandbytes(kind):
    bnb = pytest.importorskip("bitsandbytes")
    model = dense()
    for name in ("0", "2"):
        old = model[int(name)]
        bias = old.bias is not None
        if kind == "int8":
            new = bnb.nn.Linear8bitLt(
                old.in_features, old.out_features, bias, has_fp16_weights=False
            )
        else:
            new = bnb.nn.Linear4bit(
                old.in_features,
                old.out_features,
                bias,
                quant_type=kind,
                compute_dtype=torch.float32,
            )
        new.load_state_dict(old.state_dict())
        model[int(name)] = new.requires_grad_(False)
    return model.to("cpu")


def torchao(make):
    quantization = pytest.importorskip("torchao.quantization")
    model = dense()
    quantization.quantize_(model, make(quantization))
    return model


def quanto(kind):
    library = pytest.importorskip("optimum.quanto")
    model = dense()
    library.quantize(model, weights=getattr(library, kind))
    library.freeze(model)
    return model


def hqq():
    quantize = pytest.importorskip("hqq.core.quantize")
    model, config = dense(), quantize.BaseQuantizeConfig(nbits=4, group_size=64)
    for i in (0, 2):
        model[i] = quantize.HQQLinear(model[i], config, compute_dtype=torch.float32, device="cpu")
    return model


BASES = {
    "NF4": lambda: bitsandbytes("nf4"),
    "FP4": lambda: bitsandbytes("fp4"),
    "LLM.int8": lambda: bitsandbytes("int8"),
    "torchao int8": lambda: torchao(lambda q: q.Int8WeightOnlyConfig()),
    "torchao float8": lambda: torchao(lambda q: q.Float8WeightOnlyConfig()),
    "torchao intx": lambda: torchao(lambda q: q.IntxWeightOnlyConfig()),
    "quanto int8": lambda: quanto("qint8"),
    "quanto int4": lambda: quanto("qint4"),
    "quanto float8": lambda: quanto("qfloat8"),
    "HQQ": hqq,
}


PACKAGES = {"quanto": "optimum-quanto", "HQQ": "hqq", "torchao": "torchao"}


def package(kind):
    """The package that has the layers, by its name for pip."""
    return PACKAGES.get(kind.partition(" ")[0], "bitsandbytes")


def dequantised(model):
    """The same model with dense layers of the same numbers."""
    found = dense()
    with torch.no_grad():
        for name in ("0", "2"):
            layer, own = model[int(name)], found[int(name)]
            own.weight.copy_(packings.packing_of(layer).weight(layer))
            if own.bias is not None:
                own.bias.copy_(layer.bias)
    return found


def moved(adapter):
    torch.manual_seed(3)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.1 * torch.randn_like(p))


def distance(found, wanted):
    return float(((found - wanted).abs().max() / wanted.abs().max()).detach())


@pytest.fixture(params=BASES)
def kind(request):
    return request.param


@pytest.fixture
def base(kind):
    return BASES[kind]()


@pytest.mark.parametrize("method", METHODS)
def test_a_quantised_base_carries_the_adapter_of_the_dequantised_one(kind, base, method):
    x = torch.randn(5, 64)
    other = dequantised(base)
    # in eval mode LLM.int8() rounds the input, too
    rounds = 2e-2 if packings.packing_of(base[0]) is packings.bitsandbytes.EightBit else 0.0
    base.train()
    with torch.no_grad():
        start = base(x)
    adapter = weft.attach(base, METHODS[method])
    twin = weft.attach(other, METHODS[method])
    with torch.no_grad():
        if method not in ("LoRAFA", "AdaLoRA", "DyLoRA"):
            assert torch.equal(base(x), start)
        assert distance(base(x), start) < 1e-6
    moved(adapter), moved(twin)
    for mode in (True, False):
        base.train(mode), other.train(mode)
        torch.manual_seed(0)  # DyLoRA draws a rank
        found = base(x)
        torch.manual_seed(0)
        wanted = other(x)
        assert distance(found, wanted) < (1e-5 if mode or not rounds else rounds)
        if mode:
            found.square().sum().backward()
            wanted.square().sum().backward()
            for (name, p), q in zip(adapter.named_parameters(), twin.parameters(), strict=True):
                assert p.grad is not None, name
                assert float(q.grad.abs().max()) > 0 or method == "DyLoRA"
                assert distance(p.grad, q.grad) < 1e-4 or not q.grad.any(), name
    if method in weft.methods.METHODS:
        bases_record.exact(kind, method, package(kind))


@pytest.mark.parametrize(
    ("method", "per_step"), [("LoRA", 0), ("VeRA", 0), ("DoRA", 2), ("DVoRA", 0), ("DoRA olora", 2)]
)
def test_a_weight_is_unpacked_once_per_layer_and_step_at_most(base, method, per_step):
    adapter = weft.attach(base.train(), METHODS[method])
    moved(adapter)
    optimiser = torch.optim.SGD(adapter.parameters(), lr=1e-3)
    x = torch.randn(5, 64)
    base(x)  # DVoRA unpacks once in its life
    for _ in range(3):
        before = counts["unpacked"]
        for _ in range(2):  # micro-batches
            base(x).square().sum().backward()
        optimiser.step()
        optimiser.zero_grad()
        base(x)
        assert counts["unpacked"] - before <= per_step


@pytest.mark.parametrize("base", BASES)
def test_the_check_for_stale_norms_unpacks_nothing(base):
    model = BASES[base]()
    adapter = weft.attach(model, METHODS["DoRA"])
    model(torch.randn(3, 64))
    before = counts["unpacked"]
    assert adapter.stale_layers() == []
    assert counts["unpacked"] == before


@pytest.mark.parametrize("method", ["LoRA", "DoRA", "DVoRA"])
def test_training_is_audited_and_the_file_fits_the_dense_base(base, method, tmp_path):
    other = dequantised(base)
    adapter = weft.attach(base.train(), METHODS[method])
    before = weft.snapshot(base)
    optimiser = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    for step in range(4):
        torch.manual_seed(step)
        optimiser.zero_grad()
        base(torch.randn(8, 64)).square().sum().backward()
        optimiser.step()
    weft.audit(base, before, weft.snapshot(base))
    weft.save(base, tmp_path / "adapter")
    weft.load(other, tmp_path / "adapter")
    x = torch.randn(5, 64)
    with torch.no_grad():
        assert distance(base.train()(x), other.train()(x)) < 1e-5


def test_strengths_and_sums_over_a_quantised_base(base):
    """What `weft.use` computes is what `weft.combine` makes, over the dequantised weight."""
    x, strengths = torch.randn(5, 64), {"LoRA": 0.5, "DoRA": -0.7, "DVoRA": 1.0}
    for name in strengths:
        moved(weft.attach(base.train(), METHODS[name], name=name))
    with torch.no_grad():
        with weft.use(base, strengths):
            wanted = base(x)
        weft.combine(base, strengths, name="both")
        assert distance(base(x), wanted) < 1e-5


def test_detach_gives_the_layers_back(base):
    classes = [type(m) for m in base]
    weft.attach(base, METHODS["DoRA"])
    weft.detach(base)
    assert [type(m) for m in base] == classes


def test_a_layer_that_gives_its_input_no_gradient_is_refused_by_name():
    model = torchao(lambda q: q.Int8DynamicActivationInt8WeightConfig())
    with pytest.raises(weft.TargetError, match="gives its input no gradient"):
        weft.attach(model, METHODS["LoRA"])


def test_codes_that_nothing_unpacks_are_refused_by_name_and_in_the_plan():
    class GPTQLinear(nn.Module):
        def __init__(self):
            super().__init__()
            self.in_features, self.out_features = 64, 32
            self.register_buffer("qweight", torch.zeros(8, 32, dtype=torch.int32))

        def forward(self, x):
            return x[..., :32]

    model = nn.Sequential(nn.Linear(64, 64), GPTQLinear())
    with pytest.raises(weft.TargetError, match=r"'1' \(GPTQLinear\).*Weft cannot unpack"):
        weft.attach(model, weft.LoRA(targets=["1"]))
    adapter = weft.attach(model, weft.LoRA(targets="all-linear"))
    assert [(f.name, f.shape) for f in adapter.frozen] == [("1", (32, 64))]
    assert "Weft cannot unpack" in adapter.frozen[0].reason
    bases_record.refused("GPTQ, AWQ", "LoRA", "Weft cannot unpack the codes", "")


def integration(file, name):
    module = importlib.import_module(f"transformers.integrations.{file}")
    return getattr(module, name)(64, 32)


def compressed():
    library = pytest.importorskip("compressed_tensors.quantization")
    scheme = library.QuantizationScheme(
        targets=["Linear"], weights=library.QuantizationArgs(num_bits=4, strategy="channel")
    )
    model = dense()
    config = library.QuantizationConfig(config_groups={"g": scheme}, quantization_status="frozen")
    library.apply_quantization_config(model, config)
    with torch.no_grad():
        model(torch.randn(2, 64))
    return model[0]


UNREAD = {
    "float8 of transformers": (lambda: integration("finegrained_fp8", "FP8Linear"), "transformers"),
    "BitNet": (
        lambda: importlib.import_module("transformers.integrations.bitnet").BitLinear(
            64, 32, False
        ),
        "transformers",
    ),
    "compressed-tensors": (compressed, "compressed-tensors"),
    "torch.ao": (lambda: torch.ao.nn.quantized.dynamic.Linear(64, 32), "torch"),
}


@pytest.mark.parametrize("kind", UNREAD)
def test_other_packed_layers_are_refused_by_name_and_in_the_plan(kind):
    make, library = UNREAD[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is on its way out
        model = nn.Sequential(nn.Linear(64, 64), make())
    with pytest.raises(weft.TargetError, match=r"'1' .*Weft cannot unpack; load the model"):
        weft.attach(model, weft.LoRA(r=2, targets=["1"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the weights that all-linear leaves out
        adapter = weft.attach(model, weft.LoRA(r=2, targets="all-linear"))
    assert adapter.frozen[0].name == "1" and adapter.frozen[0].shape[1] == 64
    bases_record.refused(kind, "LoRA", "Weft cannot unpack the codes", library)


def test_quanto_s_activations_are_refused_by_name():
    library = pytest.importorskip("optimum.quanto")
    model = dense()
    library.quantize(model, weights=library.qint8, activations=library.qint8)
    library.freeze(model)
    with pytest.raises(weft.TargetError, match="rounds its inputs and outputs"):
        weft.attach(model, METHODS["LoRA"])


def test_a_linear_layer_with_whole_numbers_beside_its_weight_is_no_packed_one():
    class Masked(nn.Linear):
        def __init__(self):
            super().__init__(64, 32)
            self.register_buffer("kept", torch.arange(32))

        def forward(self, x):
            return super().forward(x)

    model = nn.Sequential(Masked())
    weft.attach(model, weft.LoRA(r=2, targets=["0"]))


@pytest.mark.parametrize("method", ["DoRA"])
def test_no_dense_copy_is_alive_after_a_forward(kind, method):
    """But what the layer itself keeps: torchao saves the unpacked weight for its own backward."""

    def kept(model):
        x = torch.randn(5, 64, requires_grad=True)
        model(x).sum().backward()
        before = large()
        out = model(x)
        found = len(large() - before)
        del out
        return found

    own = kept(BASES[kind]().train())
    assert own == 0 or kind.startswith("torchao")
    base = BASES[kind]().train()
    moved(weft.attach(base, METHODS[method]))
    assert kept(base) <= own


def large():
    """The memory of the tensors that are as large as a weight of the model."""
    tensors = [o for o in gc.get_objects() if type(o) is torch.Tensor]
    return {t.data_ptr() for t in tensors if t.is_floating_point() and t.numel() >= 64 * 128}


def wide(quant_type="nf4"):
    """A layer that bitsandbytes packs anew at its first evaluation, on a CPU with AVX512-BF16."""
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(512, 256, compute_dtype=torch.bfloat16, quant_type=quant_type)
    torch.manual_seed(0)
    layer.load_state_dict(nn.Linear(512, 256).state_dict())
    return nn.Sequential(layer.requires_grad_(False), nn.Tanh()).to("cpu")


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_an_evaluation_between_two_steps_changes_neither_base_nor_gradients(quant_type):
    """Where bitsandbytes would pack the weight anew (AVX512-BF16), it may not; elsewhere it does not."""
    model = wide(quant_type)
    adapter = weft.attach(model, weft.DoRA(r=4, targets=["0"]))
    moved(adapter)
    x = torch.randn(6, 512).bfloat16().requires_grad_()
    model(x)  # bitsandbytes casts the bias, in place
    before, gradients = weft.snapshot(model).base, []
    for _ in range(2):
        model.train()
        found = torch.autograd.grad(model(x).float().square().sum(), [x, *adapter.parameters()])
        gradients.append(found)
        model.eval()
        with torch.no_grad():
            model(x)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert all(bool(g.any()) for g in gradients[0])
    assert weft.snapshot(model).base == before
    assert not getattr(model[0].weight.quant_state, "packing_format_for_cpu", False)


def test_the_input_that_is_tried_leaves_the_layer_as_it_was(monkeypatch):
    monkeypatch.setattr(packed, "_faults", {})
    model = wide()
    weft.attach(model, weft.LoRA(r=4, targets=["0"]))
    assert model[0].bias.dtype == torch.float32  # a forward casts it to that of the input


def test_a_layer_that_was_packed_anew_before_attach_is_refused_by_name():
    model = wide().eval()
    with torch.no_grad():
        model(torch.randn(2, 512).bfloat16())
    if not getattr(model[0].weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("this CPU has no AVX512-BF16, for which bitsandbytes packs weights anew")
    with pytest.raises(weft.TargetError, match="first evaluation packed the weight anew"):
        weft.attach(model, weft.LoRA(targets=["0"]))
