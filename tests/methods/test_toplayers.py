"""TopLayers: the last k blocks of the stack before the output and the norm behind them, and nothing
else.
"""

import pytest
import torch
from torch import nn

import weft
from architectures import ARCHITECTURES
from support import net, same_bits

# What precedes the block's number, and the norm behind the stack; the small models have three
# blocks.
TOP = {
    "gpt2": ("transformer.h.", "transformer.ln_f"),
    "opt": ("model.decoder.layers.", "model.decoder.final_layer_norm"),
    "gpt_neox": ("gpt_neox.layers.", "gpt_neox.final_layer_norm"),
    "llama": ("model.layers.", "model.norm"),
    "t5": ("decoder.block.", "decoder.final_layer_norm"),
    "bert": ("bert.encoder.layer.", None),
    "roberta": ("roberta.encoder.layer.", None),
    "vit": ("vit.layers.", "vit.layernorm"),
    "mixtral": ("model.layers.", "model.norm"),
}


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("name", list(TOP))
def test_the_last_blocks_and_the_norm_behind_them(name, k):
    model, (prefix, norm) = ARCHITECTURES[name].build(), TOP[name]
    wanted = [
        n
        for n, _ in model.named_parameters()
        if any(n.startswith(f"{prefix}{i}.") for i in range(3 - k, 3))
        or (norm and n.startswith(f"{norm}."))
    ]
    adapter = weft.attach(model, weft.TopLayers(k=k))
    assert list(adapter.selected) == wanted and adapter.num_head_parameters == 0


@pytest.mark.parametrize("name", list(TOP))
def test_it_trains_them_and_comes_off(name):
    model, given = ARCHITECTURES[name].build(), ARCHITECTURES[name].inputs()
    with torch.no_grad():
        before = model(**given).logits
    adapter = weft.attach(model, weft.TopLayers(k=1))
    shot, optimiser = weft.snapshot(model), torch.optim.AdamW(adapter.parameters(), lr=1e-3)
    for _ in range(2):
        optimiser.zero_grad()
        model(**given).logits.tanh().pow(2).sum().backward()
        optimiser.step()
    weft.audit(model, shot, weft.snapshot(model))
    with torch.no_grad():
        assert not torch.equal(model(**given).logits, before)
        weft.detach(model)
        assert same_bits(model(**given).logits, before)


def test_more_blocks_than_there_are_and_none():
    with pytest.raises(
        weft.TargetError, match=r"TopLayers\(k=4\): the model has 3 blocks\. Take fewer"
    ):
        weft.attach(ARCHITECTURES["gpt2"].build(), weft.TopLayers(k=4))
    with pytest.raises(weft.TargetError, match=r"TopLayers\(k=3\): the model has 2 blocks"):
        weft.attach(net(), weft.TopLayers(k=3))
    with pytest.raises(
        weft.TargetError,
        match="TopLayers selects none of the 2 tensors of Linear: it has neither repeated",
    ):
        weft.attach(nn.Linear(3, 4), weft.TopLayers())
    for k in (0, -1, True, 1.5, "2"):
        with pytest.raises(
            weft.ConfigError, match=rf"TopLayers\(k={k!r}\): k must be a whole number"
        ):
            weft.TopLayers(k=k)


def test_a_model_without_repeated_blocks_counts_its_children():
    assert list(weft.attach(net(), weft.TopLayers(k=1)).selected) == ["mid.weight", "mid.bias"]
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))
    assert list(weft.attach(model, weft.TopLayers(k=2)).selected) == [
        "2.weight",
        "2.bias",
        "4.weight",
        "4.bias",
    ]


def test_blocks_inside_the_head_and_lists_without_attention_do_not_count():
    def block():
        return nn.ModuleDict({"attn": nn.ModuleDict({"q": nn.Linear(4, 4)}), "up": nn.Linear(4, 4)})

    model = nn.ModuleDict(
        {
            "layers": nn.ModuleList([block(), block()]),
            "norm": nn.LayerNorm(4),
            "adapters": nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]),
            "head": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)),
        }
    )
    wanted = [n for n, _ in model.named_parameters() if n.startswith(("layers.1.", "norm."))]
    assert list(weft.attach(model, weft.TopLayers(k=1)).selected) == wanted
