"""Weights of a dtype that cannot train stay frozen, by name in the plan, with every method."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import weft
from support import METHODS, config
from weft.methods import LayerConfig

FLOAT8 = torch.float8_e4m3fn
IDS = torch.arange(12).view(2, 6)
STORED = {
    "model.layers.0.mlp.up_proj.weight": FLOAT8,
    "model.layers.1.self_attn.o_proj.weight": torch.int8,
    "model.layers.1.self_attn.o_proj.bias": torch.float8_e5m2,
    "model.layers.0.input_layernorm.weight": FLOAT8,
}


class Cast(nn.Linear):
    """Computes in the input's dtype, like the linear layers of quantised models."""

    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class CastNorm(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.weight = norm.weight

    def forward(self, x):
        return self.weight.to(x.dtype) * F.rms_norm(x, x.shape[-1:])


def model():
    torch.manual_seed(0)
    made = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=16,
            hidden_size=16,
            intermediate_size=28,
            num_hidden_layers=2,
            num_attention_heads=2,
            attention_bias=True,
        )
    )
    for name, dtype in STORED.items():
        parent, _, tensor = name.rpartition(".")
        holder = made.get_submodule(parent)
        if isinstance(holder, nn.Linear):
            holder.__class__ = Cast
        else:
            made.set_submodule(parent, CastNorm(holder))
            holder = made.get_submodule(parent)
        values = getattr(holder, tensor).detach()
        stored = (values if dtype.is_floating_point else 100 * values).to(dtype)
        setattr(holder, tensor, nn.Parameter(stored, requires_grad=False))
    return made


@pytest.mark.parametrize("name", METHODS)
def test_every_method_leaves_them_frozen_and_says_so(name, tmp_path):
    made = model()
    adapts = issubclass(METHODS[name], LayerConfig)
    given = config(name, **({"targets": "all-linear", "r": 2} if adapts else {}))
    if name == "Bottleneck":
        given = weft.Bottleneck(preset="houlsby", r=2)  # targets by role
    adapter = weft.attach(made, given)
    frozen = {f.name: f.reason for f in adapter.plan().frozen}
    for tensor in STORED:
        reason = frozen.get(tensor) or frozen[tensor.rpartition(".")[0]]
        assert "float8" in reason or "int8" in reason
        assert tensor not in adapter.selected and tensor.rpartition(".")[0] not in adapter.layers
    before = weft.snapshot(made)
    optimiser = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    made.train()
    for _ in range(4):
        optimiser.zero_grad()
        made(IDS, labels=IDS).loss.backward()
        optimiser.step()
    weft.audit(made, before, weft.snapshot(made))
    weft.save(made, tmp_path)
    logits, again = made.eval()(IDS).logits, model().eval()
    weft.load(again, tmp_path)
    assert torch.allclose(again(IDS).logits, logits, atol=1e-5)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (weft.LoRA(train=["up_proj"]), "0.mlp.up_proj.weight': it is float8_e4m3fn, which cannot"),
        (weft.LoRA(modules_to_save=["o_proj"]), "1.self_attn.o_proj.weight': it is int8, which"),
        (weft.LoRA(targets=["up_proj"]), r"its weight is quantised \(float8_e4m3fn\)"),
    ],
)
def test_one_that_is_named_is_an_error(given, words):
    with pytest.raises(weft.TargetError, match=words):
        weft.attach(model(), given)


def test_a_word_that_selects_only_such_tensors_says_why():
    made = model()
    made.lm_head.weight = nn.Parameter(made.lm_head.weight.detach().to(FLOAT8), requires_grad=False)
    with pytest.raises(weft.TargetError, match=r"'lm_head.weight' is float8_e4m3fn, which cannot"):
        weft.attach(made, weft.Head())
