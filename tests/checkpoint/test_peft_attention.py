"""LoRA on nn.MultiheadAttention to and from peft, and what peft has no form for."""

import json
from pathlib import Path

import peft
import pytest
import torch
from torch import nn

import weft
from support import distance

pytestmark = pytest.mark.filterwarnings("ignore")  # peft's own


class Block(nn.Module):
    """Not nn.TransformerEncoderLayer, whose fused kernel reads the weights past peft."""

    def __init__(self):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(16, 4, batch_first=True)
        self.linear1, self.linear2 = nn.Linear(16, 20), nn.Linear(20, 16)

    def forward(self, x):
        x = x + self.self_attn(x, x, x, need_weights=False)[0]
        return x + self.linear2(self.linear1(x).relu())


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.top = nn.Linear(16, 5)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.top(x)


X = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(1))


def net():
    torch.manual_seed(0)
    return Net().eval()


def moved(model):
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))


def peft_file(folder, **fields):
    given = {"r": 2, "lora_alpha": 5, "target_modules": ["self_attn", "linear1"]}
    model = peft.get_peft_model(net(), peft.LoraConfig(**{**given, **fields}))
    moved(model)
    model.save_pretrained(folder)
    return model.eval()(X).detach()


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"use_rslora": True},
        {"target_modules": ["self_attn"], "lora_dropout": 0.1},
        {"target_modules": r".*\.1\.self_attn"},
        {"rank_pattern": {r"layers\.1\.self_attn": 3}, "alpha_pattern": {"linear1": 7}},
        {"exclude_modules": r".*\.0\..*"},
    ],
    ids=["plain", "rslora", "dropout", "expression", "patterns", "exclude"],
)
def test_from_peft_and_back(fields, tmp_path):
    wanted = peft_file(tmp_path / "peft", **fields)
    model = net()
    base = model(X)
    adapter = weft.load(model, tmp_path / "peft")
    assert distance(model(X), wanted) < 1e-6 < distance(wanted, base)
    assert any("twice what the file's tensors say" in n for n in adapter.load_report.notes)
    adapter.save(tmp_path / "weft")
    assert weft.inspect(tmp_path / "weft").readable_by_peft
    again = net()
    weft.load(again, tmp_path / "weft")
    assert torch.equal(again(X), model(X))
    found = peft.PeftModel.from_pretrained(net(), tmp_path / "weft").eval()
    assert distance(found(X), wanted) < 1e-6


@pytest.mark.parametrize("method", ["LoRA", "pissa", "VeRA exported", "AdaLoRA exported"])
def test_an_adapter_of_weft_loads_in_peft(method, tmp_path):
    model = net()
    given = {
        "LoRA": weft.LoRA(r=2, alpha=3.0),
        "pissa": weft.LoRA(r=2, init="pissa", targets=["self_attn"]),
        "VeRA exported": weft.VeRA(r=4),
        "AdaLoRA exported": weft.AdaLoRA(r=2, total_steps=9),
    }[method]
    adapter = weft.attach(model, given)
    moved(model)
    adapter.save(tmp_path / "own")
    folder = tmp_path / "own"
    if "exported" in method:
        assert not weft.inspect(folder).readable_by_peft
        folder = tmp_path / "peft"
        weft.export(tmp_path / "own", "lora", folder)
    found = peft.PeftModel.from_pretrained(net(), folder).eval()
    assert distance(found(X), model(X)) < 1e-6
    again = net()
    weft.load(again, folder)
    assert distance(again(X), model(X)) < 1e-6


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (weft.DoRA(r=2), "peft has no DoRA on the attention"),
        (weft.LoRA(r=2, targets=["in_proj_weight"]), "has no such companion"),
        (weft.LoRA(r=2, targets={"in_proj_weight": {"r": 3}, "out_proj": {}}), "no such companion"),
        (weft.VeRA(r=2), "which its module reads itself"),
    ],
    ids=["dora", "one of the two", "two ranks", "vera"],
)
def test_what_peft_has_no_form_for_stays_in_wefts_own(config, words, tmp_path):
    model = net()
    weft.attach(model, config)
    moved(model)
    weft.save(model, tmp_path / "own")
    assert not weft.inspect(tmp_path / "own").readable_by_peft
    with pytest.raises(weft.UnsupportedError, match=words):
        weft.export(tmp_path / "own", "peft", tmp_path / "peft")


def test_files_of_peft_that_mean_something_else_are_refused(tmp_path):
    """An out_proj alone is trained by peft and never read; a later peft may add its update once."""
    peft_file(tmp_path / "alone", target_modules=["out_proj", "linear1"])
    model = net()
    with pytest.raises(weft.CheckpointError, match=r"peft trains such a layer without effect"):
        weft.load(model, tmp_path / "alone")
    peft_file(tmp_path / "later")
    file = Path(tmp_path / "later/adapter_config.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "peft_version": "0.99.0"}))
    with pytest.raises(weft.WeftError, match=r"peft 0\.99\.0 still adds the update"):
        weft.load(model, tmp_path / "later")
    assert not weft.adapters(model)


def test_a_file_from_before_attention_was_adapted_loads(tmp_path):
    model = net()
    adapter = weft.attach(model, weft.LoRA(r=2, exclude=["self_attn"]))
    moved(model)
    wanted = model(X)
    adapter.config = weft.LoRA(r=2)  # as an older version would have written it
    adapter.save(tmp_path)
    again = net()
    assert len(weft.load(again, tmp_path).layers) == 5
    assert torch.equal(again(X), wanted)
