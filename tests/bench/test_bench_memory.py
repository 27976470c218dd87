"""Bytes counted by the harness, held against small graphs that can be counted by hand."""

import torch
from torch import nn

from benchmarks.memory import Live, SavedBytes, of_step

ROWS, IN, OUT = 3, 4, 5
Y = ROWS * OUT * 4  # bytes of one activation behind the layer


class Layered(nn.Module):
    def __init__(self, trained=False):
        super().__init__()
        self.layer = nn.Linear(IN, OUT, bias=False).requires_grad_(trained)

    def forward(self, x):
        y = self.layer(x)  # saves x if W is trained, and W
        z = y.tanh()  # saves its result z
        u = z.view(-1).view(ROWS, OUT) * z  # saves z again, twice, as other views of one storage
        return u.exp().sum()  # exp saves its result; sum saves nothing


def count(model, x, adapted=()):
    counter = SavedBytes(model, [], adapted)
    with counter.counting():
        out = model(x)
    assert out.requires_grad
    return counter


def test_each_storage_counts_once_and_parameters_do_not():
    counter = count(Layered(), torch.randn(ROWS, IN, requires_grad=True))
    assert counter.bytes == 2 * Y  # z and exp(u); W is a parameter


def test_an_input_is_kept_where_the_weight_trains_and_a_batch_counts_only_where_it_is_no_batch():
    x = torch.randn(ROWS, IN)
    assert count(Layered(trained=True), x).bytes == 2 * Y + ROWS * IN * 4
    model = Layered(trained=True)
    assert of_step(model, {"x": x}, lambda: model(x), ["layer"])["saved"] == 2 * Y


def test_a_copy_of_a_parameter_counts_and_a_view_of_it_does_not():
    class Copies(nn.Module):
        def __init__(self, change):
            super().__init__()
            self.weight, self.change = (
                nn.Parameter(torch.randn(OUT, IN), requires_grad=False),
                change,
            )

        def forward(self, x):
            return x @ self.change(self.weight)

    x = torch.randn(ROWS, IN, requires_grad=True)
    assert count(Copies(lambda w: w.t()), x).bytes == 0
    assert count(Copies(lambda w: w.t().contiguous()), x).bytes == OUT * IN * 4
    assert count(Copies(lambda w: w.t().double().float()), x).bytes == OUT * IN * 4


def test_what_is_kept_says_its_shape_and_whether_an_adapted_layer_kept_it():
    counter = count(Layered(trained=True), torch.randn(ROWS, IN), adapted=["layer"])
    assert [(k["shape"], k["adapted"], k["bytes"]) for k in counter.kept] == [
        ([ROWS, OUT], False, 2 * Y),
        ([ROWS, IN], True, ROWS * IN * 4),
    ]
    assert sum(k["bytes"] for k in counter.kept) == counter.bytes


def test_what_a_custom_function_hides_from_the_hooks_is_alive_all_the_same():
    class Hiding(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.hidden = x.exp()
            return x.sum()

        @staticmethod
        def backward(ctx, g):
            return g * ctx.hidden

    model, x = nn.Module(), torch.randn(1000, requires_grad=True)
    found = of_step(model, {"x": x}, lambda: Hiding.apply(x), ())
    assert found["saved"] == 0
    assert found["held"] >= 4000
    assert found["peak"] >= found["held"] + 4000  # the gradient beside it


def test_live_bytes_fall_when_a_tensor_dies_and_the_peak_stays():
    x = torch.randn(100)
    with Live([x]) as live:
        y = x + 1
        z = y[:10]  # a view takes nothing
        assert live.bytes == 400
        w = y * 2
        assert live.bytes == 800
        del w
        assert live.bytes == 400
        del y, z
        assert live.bytes == 0
        x.add_(1)
        assert live.bytes == 0 and live.peak == 800
