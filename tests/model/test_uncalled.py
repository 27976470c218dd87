"""Layers whose weight the model reads itself: noticed in the first forward, at save and at merge."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import weft
from support import awake, move, same_bits

NEVER = "never calls 'layer' but reads its weight"
BOTH = "calls 'layer' and also reads its weight itself"


class Net(nn.Module):
    """`layer` is read as `read` does, and called if there is no `read` or it `calls`; `pool` is
    neither called nor read.
    """

    def __init__(self, read=None, calls=False):
        super().__init__()
        self.layer, self.mid, self.pool = (nn.Linear(7, 7) for _ in range(3))
        self.read, self.calls = read, calls

    def forward(self, x):
        y = 0.0
        if self.calls or self.read is None:
            y = self.layer(x)
        if self.read is not None:
            y = y + self.read(x, self.layer)
        return self.mid(torch.tanh(y))


def linear(x, layer):
    return F.linear(x, layer.weight, layer.bias)


def attached(*targets, read=linear, calls=False):
    torch.manual_seed(0)
    model = Net(read, calls).eval()
    move(weft.attach(model, weft.LoRA(r=2, targets=list(targets))))
    return model, torch.randn(3, 7)


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        return x @ weight.t()


READS = {
    "linear": linear,
    "a product": lambda x, layer: x @ layer.weight.t(),
    "its data": lambda x, layer: F.linear(x, layer.weight.data),
    "detached": lambda x, layer: x @ layer.weight.detach().T,
    "cast": lambda x, layer: x @ layer.weight.to(torch.float64).to(x.dtype).T,
    "some rows": lambda x, layer: (x @ layer.weight[2:].t()).sum(1)[:, None].expand(3, 7),
    "several results": lambda x, layer: x * torch.max(layer.weight, dim=0)[0],
    "numpy": lambda x, layer: x @ torch.from_numpy(layer.weight.detach().numpy()).T,
    "a function of its own": lambda x, layer: Product.apply(x, layer.weight),
    "past the adapter": lambda x, layer: nn.Linear.forward(layer, x),
    "a list": lambda x, layer: x @ torch.cat([layer.weight, layer.weight], 0)[:7],
}
FORMS = {
    "to": lambda x, layer: x.to(layer.weight),
    "type_as": lambda x, layer: x.type_as(layer.weight),
    "dtype": lambda x, layer: x.to(layer.weight.dtype, layer.weight.device != "cpu"),
    "new": lambda x, layer: x + layer.weight.new_zeros(7),
    "like": lambda x, layer: x + torch.zeros_like(layer.weight)[0],
    "size": lambda x, layer: x + layer.weight.shape[0] + layer.weight.numel(),
    "gradient": lambda x, layer: x if layer.weight.grad is None else x + 1,
    "view": lambda x, layer: x + layer.weight.view(-1).dim(),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("how", READS)
def test_a_weight_that_the_model_reads_and_never_calls_is_an_error_in_the_first_forward(
    how, training
):
    model, x = attached("layer", "mid", read=READS[how])
    model.train(training)
    for _ in range(4):
        with pytest.raises(weft.WeftError, match=NEVER):
            model(x)
    with weft.use(model, None):
        model(x)
    assert torch.overrides._get_current_function_mode() is None


@pytest.mark.parametrize("how", FORMS)
def test_what_only_asks_for_the_form_of_a_weight_does_not_read_it(how):
    model, x = attached("layer", "mid", read=FORMS[how], calls=True)
    model(x), model(x)
    weft.merge(model, verify=x)
    model, x = attached("layer", "mid", read=FORMS[how])
    model(x), model(x)


@pytest.mark.parametrize("which", [["default", "b", None], {"default": 1.0, "b": 0.5}])
def test_it_is_noticed_with_rows_and_strengths_too(which):
    model, x = attached("layer", "mid")
    move(weft.attach(model, weft.LoRA(r=2, targets=["mid"]), name="b"))
    with weft.use(model, which), pytest.raises(weft.WeftError, match=NEVER):
        model(x)
    with weft.use(model, "b"):
        model(x)


@pytest.mark.parametrize("forwards", [0, 1])
def test_a_copy_looks_too(forwards):
    model, x = attached("layer", "mid", read=linear)
    if forwards:
        with pytest.raises(weft.WeftError, match=NEVER):
            model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
        with pytest.raises(weft.WeftError, match=NEVER):
            other(x)
        with pytest.raises(weft.MergeError, match=NEVER):
            weft.merge(other)


def test_after_one_forward_save_and_merge_refuse_without_running_anything(tmp_path):
    model, x = attached("layer", "mid")
    with pytest.raises(weft.WeftError, match=NEVER):
        model(x)
    weight = model.layer.weight.clone()
    with pytest.raises(weft.MergeError, match=f"nothing was merged: the model {NEVER}"):
        weft.merge(model)
    with pytest.raises(weft.CheckpointError, match=f"nothing was saved: the model {NEVER}"):
        weft.save(model, tmp_path / "a")
    assert same_bits(model.layer.weight, weight) and not (tmp_path / "a").exists()
    weft.detach(model)
    move(weft.attach(model, weft.LoRA(r=2, targets=["mid"])))
    model(x)
    weft.save(model, tmp_path / "a")
    weft.merge(model, verify=x)


@pytest.mark.parametrize("targets", [["layer"], ["layer", "mid"]])
def test_merge_that_verifies_looks_by_itself(targets):
    model, x = attached(*targets)
    weight = model.layer.weight.clone()
    with pytest.raises(weft.MergeError, match=f"nothing was merged: the model {NEVER}"):
        weft.merge(model, verify=x)
    assert same_bits(model.layer.weight, weight)


def test_a_layer_that_is_called_and_read_is_warned_of_and_not_merged(tmp_path):
    model, x = attached("layer", "mid", calls=True)
    with pytest.warns(UserWarning, match=BOTH):
        before = model(x)
    assert same_bits(model(x), before)  # once
    weight = model.layer.weight.clone()
    for given in ({}, {"verify": x}):
        with pytest.raises(weft.MergeError, match=f"nothing was merged: the model {BOTH}"):
            weft.merge(model, **given)
    with pytest.raises(weft.MergeError, match="changed the outputs"):
        weft.merge(model, verify=x, tolerance=1e-3)
    assert same_bits(model.layer.weight, weight)
    weft.save(model, tmp_path)  # what is saved computes the same again
    unseen, x = attached("layer", "mid", calls=True)
    with pytest.raises(weft.MergeError, match=f"nothing was merged: the model {BOTH}"):
        weft.merge(unseen, verify=x)


def test_a_read_that_does_not_matter_is_merged_if_it_is_measured():
    model, x = attached("layer", "mid", read=lambda x, p: 0 * p.weight.norm(), calls=True)
    with pytest.raises(weft.MergeError, match=r"If the read does not matter.*tolerance"):
        weft.merge(model, verify=x)
    weft.merge(model, verify=x, tolerance=1e-4)


def test_a_method_that_changes_no_weight_is_not_warned_of():
    model, x = Net(linear, calls=True), torch.randn(3, 7)
    weft.attach(model, weft.Bottleneck(targets=["layer"]))
    model(x)


class Vision(nn.Module):
    """A model one of whose branches needs an image."""

    def __init__(self):
        super().__init__()
        self.text, self.vision = nn.Linear(7, 7), nn.Linear(7, 7)

    def forward(self, x, image=None):
        return self.text(x) if image is None else self.text(x) + self.vision(image)


@pytest.mark.parametrize("targets", [["vision"], ["vision", "text"]])
def test_a_branch_that_does_not_run_is_no_fault(targets):
    model, x = Vision().eval(), torch.randn(3, 7)
    move(weft.attach(model, weft.LoRA(r=2, targets=targets)))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(3):
            model(x)
        model(x, x)
        model(x)
    assert len(found) == (len(targets) == 1)  # that it changed nothing, once
    assert all("None of the 1 layers of adapter 'default' was called" in str(w) for w in found)
    weft.merge(model, verify=(x, x))


def test_layers_that_are_neither_called_nor_read_are_let_through():
    model, x = attached("mid", "pool", read=None)
    for _ in range(3):
        model(x)
    weft.merge(model, verify=x)
    model, x = attached("pool", read=None)
    with pytest.raises(weft.MergeError, match="does not change the outputs"):
        weft.merge(model, verify=x)


def test_a_read_in_one_mode_only_is_noticed_there():
    def in_training(x, layer):
        return linear(x, layer) if layer.training else x

    model, x = attached("layer", "mid", read=in_training)
    model(x), model(x), model(x)
    model.train()
    with pytest.raises(weft.WeftError, match=NEVER):
        model(x)


class Words(nn.Module):
    """A model that computes its logits, or its embeddings, from the table's weight."""

    def __init__(self, calls):
        super().__init__()
        self.layer, self.mid = nn.Embedding(20, 7), nn.Linear(7, 7)
        self.calls = calls

    def forward(self, ids):
        if self.calls:
            return F.linear(self.mid(self.layer(ids)), self.layer.weight)
        return self.mid(F.embedding(ids, self.layer.weight))


@pytest.mark.parametrize("calls", [False, True])
def test_rows_of_new_tokens_are_watched_too(calls):
    model, ids = Words(calls).eval(), torch.tensor([[1, 2, 3]])
    move(weft.attach(model, weft.LoRA(r=2, targets=["mid"], new_tokens={"layer": [1, 2]})))
    if calls:
        with pytest.warns(UserWarning, match=f"{BOTH}.*out of new_tokens"):
            model(ids)
    else:
        with pytest.raises(weft.WeftError, match=f"{NEVER}.*out of new_tokens"):
            model(ids)
    for given in ({}, {"verify": ids}):
        with pytest.raises(weft.MergeError, match=BOTH if calls else NEVER):
            weft.merge(model, **given)


def test_layers_that_run_in_one_row_of_a_batch_have_run():
    a = awake("LoRA")
    awake("VeRA", name="b", model=a.model)
    model = copy.deepcopy(a.model)
    for adapter in weft.adapters(model).values():
        for layer in adapter.layers.values():
            layer.ran = False
    with weft.use(model, ["default", None, "b", "b"]):
        model(a.x)
    assert all(x.ran for each in weft.adapters(model).values() for x in each.layers.values())


def test_looking_does_not_keep_torch_from_its_fused_kernels():
    """Which fill padding with zeros, and a function mode switches them off."""
    layer = nn.TransformerEncoderLayer(12, 2, 20, batch_first=True)
    model = nn.ModuleDict({"body": nn.TransformerEncoder(layer, 2), "head": nn.Linear(12, 12)})
    model.forward = lambda x, hidden: model["head"](model["body"](x, src_key_padding_mask=hidden))
    move(weft.attach(model.eval(), weft.LoRA(r=2, targets=["head"])))
    hidden = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors are a prototype, says torch
        x = torch.randn(2, 5, 12)
        assert same_bits(model(x, hidden), model(x, hidden))


def test_an_interrupted_forward_leaves_no_watch_behind():
    model, x = attached("layer", "mid")

    def interrupt(module, args):
        raise KeyboardInterrupt

    hook = model.mid.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(x)
    hook.remove()
    with weft.use(model, None):
        model(x)
    assert torch.overrides._get_current_function_mode() is None


def test_the_next_forward_of_any_model_ends_the_watch_of_an_interrupted_one():
    model, x = attached("layer", "mid")

    def interrupt(module, args):
        raise KeyboardInterrupt

    model.mid.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(x)
    del model
    other, x = attached("layer", "mid")
    with pytest.raises(weft.WeftError, match="never calls"):
        other(x)
    assert torch.overrides._get_current_function_mode() is None
