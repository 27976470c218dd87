"""A parent that hands its layers' weights to a fused kernel must not leave the adapters out."""

import copy
import warnings

import pytest
import torch
from torch import nn

import weft


def encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, 2, 20, batch_first=True)
    return nn.TransformerEncoder(layer, 2).eval()


@pytest.mark.parametrize("padded", [False, True])
def test_an_encoder_in_eval_mode_without_gradients_runs_its_adapters(padded):
    model = encoder()
    x = torch.randn(3, 5, 12)
    hidden = torch.tensor([[False] * 5, [False] * 4 + [True], [False] * 3 + [True] * 2])
    mask = {"src_key_padding_mask": hidden} if padded else {}
    adapter = weft.attach(model, weft.LoRA(r=3, targets="mlp"))
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_(std=0.5)
    copied = copy.deepcopy(model)
    with_gradients = model(x, **mask)
    with torch.no_grad():
        without = model(x, **mask)
        with weft.use(model, None):
            base = model(x, **mask)
        of_copy = copied(x, **mask)
    assert (without - base).abs().max() > 0.1
    torch.testing.assert_close(without, with_gradients.detach())
    torch.testing.assert_close(of_copy, without)
    weft.merge(model, verify=(x,))


def test_detach_switches_the_fused_kernel_on_again():
    model = encoder()
    hooks = [len(m._forward_pre_hooks) for m in model.modules()]
    nested = model.use_nested_tensor
    weft.attach(model, weft.LoRA(r=3, targets="mlp"), name="a")
    weft.attach(model, weft.VeRA(r=3, targets="mlp"), name="b")
    weft.detach(model, "a")
    blocks = [m for m in model.modules() if isinstance(m, torch.nn.TransformerEncoderLayer)]
    assert model.use_nested_tensor is False
    assert [len(m._forward_pre_hooks) for m in blocks] == [1, 1]
    weft.detach(model, "b")
    assert [
        len(m._forward_pre_hooks) for m in model.modules()
    ] == hooks and model.use_nested_tensor is nested
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # nested tensors are a prototype, says torch
        model(torch.randn(3, 5, 12), src_key_padding_mask=torch.zeros(3, 5, dtype=torch.bool))
