"""A batch of many adapters takes as many products as a batch of few."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import weft
from support import check_close, reference_paths

METHODS = [weft.LoRA, weft.VeRA, weft.DoRA, weft.DVoRA]


class Products(TorchDispatchMode):
    """How many matrix products ran."""

    def __init__(self):
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += func.overloadpacket.__name__ in (
            "mm",
            "addmm",
            "bmm",
            "linear",
            "baddbmm",
            "addmm_",
        )
        return func(*args, **(kwargs or {}))


def crowd(n):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 12))
    for i in range(n):
        adapter = weft.attach(model, METHODS[i % 4](r=4, targets=["0", "2"]), name=f"a{i}")
        with torch.no_grad():
            for p in adapter.parameters():
                p.add_(0.3 * torch.randn_like(p))
    return model


def products(model, names, x):
    with torch.no_grad(), weft.use(model, names):
        model(x)  # norms are kept from here on
        with Products() as counted:
            model(x)
    return counted.n


@pytest.mark.parametrize("shape", [(16, 12), (16, 3, 12)], ids=["rows", "rows and tokens"])
def test_the_number_of_products_does_not_grow_with_the_adapters(shape):
    x = torch.randn(*shape)
    four, sixteen = (products(crowd(n), [f"a{i % n}" for i in range(16)], x) for n in (4, 16))
    assert sixteen <= four <= 2 * (1 + 2 * 4)


class Readers(nn.Module):
    """Two layers that read one input, which may be written to in between."""

    def __init__(self, written):
        super().__init__()
        self.a, self.b, self.written = nn.Linear(12, 16), nn.Linear(12, 16), written

    def forward(self, x):
        x = x * 1
        y = self.a(x)
        if self.written:
            with torch.no_grad():
                x.mul_(2)
        return y + self.b(x)


@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("inference", [False, True])
def test_layers_that_read_one_input_share_what_is_gathered_of_it_unless_it_was_written_to(
    written, inference
):
    torch.manual_seed(0)
    model, x = Readers(written), torch.randn(4, 3, 12)
    for i, method in enumerate(METHODS):
        for p in weft.attach(model, method(r=4), name=f"a{i}").parameters():
            torch.nn.init.normal_(p)
    with (
        torch.inference_mode(inference),
        torch.no_grad(),
        weft.use(model, [f"a{i}" for i in range(4)]),
    ):
        model(x)
        with Products() as counted:
            mixed = model(x)
    with torch.no_grad():
        for row in range(4):
            with weft.use(model, f"a{row}"):
                check_close(mixed[row], model(x[row : row + 1])[0], torch.float32, f"row {row}")
    # of each layer the base's, two bmm, two for VeRA and DVoRA, of which one may be shared
    assert counted.n == (10 if written or inference else 9)


def test_one_input_may_be_trained_on_twice():
    model, x = crowd(8), torch.randn(8, 12, requires_grad=True)
    found = []
    for _ in range(2):
        x.grad = None
        with weft.use(model, [f"a{(i + 1) % 8}" for i in range(8)]):
            model(x).pow(2).sum().backward()
        found.append(x.grad)
    assert torch.equal(*found)


@pytest.mark.parametrize(
    "names",
    [
        [None if n < 0 else f"a{n}" for n in (0, 1, 2, 3, -1, 4, 5, 6, 7, 1, -1, 0, 0, 3, 9, 8)],
        [f"a{i}" for i in range(16)],
        ["a3"] * 16,
    ],
    ids=["some", "all", "one"],
)
@pytest.mark.parametrize("grad", [True, False])
def test_each_row_gets_what_its_adapter_alone_gives(names, grad):
    model, x = crowd(16), torch.randn(16, 3, 12)
    with torch.set_grad_enabled(grad):
        with weft.use(model, names):
            mixed = model(x)
        for row, name in enumerate(names):
            with weft.use(model, name):
                check_close(
                    mixed[row].detach(),
                    model(x[row : row + 1])[0].detach(),
                    torch.float32,
                    f"row {row}, {name}",
                )


def test_gradients_of_a_mixed_batch_are_those_of_its_rows(monkeypatch):
    model, x = crowd(8), torch.randn(8, 3, 12)
    parameters = [
        p for name in weft.adapters(model) for p in weft.adapters(model)[name].parameters()
    ]
    found = []
    for reference in ("0", "1"):
        reference_paths(monkeypatch, reference)
        with weft.use(model, [f"a{i}" for i in range(8)]):
            found.append(torch.autograd.grad(model(x).pow(2).sum(), parameters))
    for ours, plain in zip(*found, strict=True):
        check_close(ours, plain, torch.float32)


@pytest.mark.parametrize("which", [["a0", "a1", "a2", "a3"], {"a0": 0.5, "a2": 2.0}], ids=str)
def test_how_a_layer_is_computed_is_decided_once(which, monkeypatch):
    from weft.model import layer

    model, x, made = crowd(4), torch.randn(4, 3, 12), []
    own = layer.LayerPlan
    monkeypatch.setattr(layer, "LayerPlan", lambda *a: made.append(a) or own(*a))
    with torch.no_grad(), weft.use(model, which):
        first = model(x)
        plans = len(made)
        torch.testing.assert_close(model(x), first)
        assert len(made) == plans
