"""Convolutions in files of peft, both ways, and what peft cannot hold, refused by name."""

import json

import peft
import pytest
import torch
from checkpoint_support import quiet
from peft import AdaLoraConfig, LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

import weft
from support import config, distance

LIMIT = 1e-6


class Net(nn.Module):
    """Rows of [5, 9] through convolutions of one, two and three dimensions, and a linear layer."""

    def __init__(self, **changes):
        super().__init__()
        self.one = nn.Conv1d(5, 6, 3, stride=2, padding="valid")
        self.two = nn.Conv2d(3, 4, (3, 2), padding=1, **changes)
        self.point = nn.Conv2d(4, 4, 1, bias=False)
        self.three = nn.Conv3d(1, 4, 2, stride=(1, 2, 2))
        self.mid = nn.Linear(4, 7)
        self.head = nn.Linear(7, 2)

    def forward(self, x):
        h = torch.tanh(self.one(x)).view(-1, 3, 4, 2)
        h = torch.tanh(self.point(torch.tanh(self.two(h))))
        h = torch.tanh(self.three(h[:, None])).mean((2, 3, 4))
        return self.head(torch.tanh(self.mid(h)))


CONVOLUTIONS = ["one", "two", "point", "three"]
X = torch.randn(4, 5, 9, generator=torch.Generator().manual_seed(3))


def pair(**changes):
    """The same model twice."""
    torch.manual_seed(0)
    first, second = Net(**changes).eval(), Net(**changes).eval()
    second.load_state_dict(first.state_dict())
    return first, second


def moved(parameters):
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in parameters:
            p.add_(0.3 * torch.randn(p.shape, generator=generator))


def peft_of(model, made):
    with quiet():
        found = peft.get_peft_model(model, made)
    moved(p for n, p in found.named_parameters() if "lora_" in n and "ranknum" not in n)
    return found.eval()


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("rslora", [False, True])
def test_a_file_of_peft_gives_the_same_outputs(dora, rslora, tmp_path):
    base, mine = pair()
    made = LoraConfig(
        r=3,
        lora_alpha=5,
        use_dora=dora,
        use_rslora=rslora,
        target_modules=[*CONVOLUTIONS, "mid"],
        rank_pattern={"two": 2},
        alpha_pattern={"three": 7},
    )
    theirs = peft_of(base, made)
    theirs.save_pretrained(str(tmp_path))
    adapter = weft.load(mine, tmp_path)
    assert set(adapter.layers) == {*CONVOLUTIONS, "mid"}
    assert distance(mine(X), theirs(X)) <= LIMIT
    shown = {row.name: (row.kind, row.shape) for row in weft.inspect(tmp_path).rows}
    assert shown["two"] == ("convolution", (4, 18)) and shown["mid"] == ("linear", (7, 4))
    weft.merge(mine, verify=X)
    with quiet():
        whole = theirs.merge_and_unload()
    assert distance(mine(X), whole(X)) <= 1e-5


@pytest.mark.parametrize("variant", ["LoRA", "LoRA:rslora=True", "DoRA", "LoRA:init=pissa"])
def test_peft_reads_what_weft_saves_and_so_does_weft(variant, tmp_path):
    model, base = pair()
    changes = {"r": 2} if "pissa" in variant else {}
    targets = {**{n: {} for n in [*CONVOLUTIONS[1:], "mid"]}, "one": {"alpha": 9.0}}
    moved(weft.attach(model, config(variant, targets=targets, **changes)).parameters())
    weft.save(model, tmp_path)
    assert weft.inspect(tmp_path).readable_by_peft
    again = pair()[0]
    weft.load(again, tmp_path)
    assert torch.equal(again(X), model(X))
    with quiet() as said:
        theirs = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    assert not said
    assert distance(theirs(X), model(X)) <= LIMIT
    second = tmp_path / "again"
    with quiet():
        theirs.save_pretrained(str(second))
    third = pair()[0]
    weft.load(third, second)
    assert distance(third(X), model(X)) <= LIMIT


def test_methods_without_a_form_in_peft_become_lora_with_kernels(tmp_path):
    for name in ("LoRAFA", "DyLoRA", "VeRA"):
        model, base = pair()
        moved(weft.attach(model, config(name, targets="conv")).parameters())
        weft.save(model, tmp_path / name)
        assert not weft.inspect(tmp_path / name).readable_by_peft
        weft.export(tmp_path / name, "lora", tmp_path / f"{name}-lora")
        with quiet():
            theirs = PeftModel.from_pretrained(base, str(tmp_path / f"{name}-lora")).eval()
        assert distance(theirs(X), model(X)) <= LIMIT


def test_adalora_of_two_dimensions_both_ways_and_of_others_in_weft_alone(tmp_path):
    model, base = pair()
    moved(weft.attach(model, config("AdaLoRA", targets=["two", "point", "mid"])).parameters())
    weft.save(model, tmp_path / "mine")
    with quiet():
        theirs = PeftModel.from_pretrained(base, str(tmp_path / "mine")).eval()
    assert distance(theirs(X), model(X)) <= LIMIT
    base, mine = pair()
    made = AdaLoraConfig(init_r=3, target_r=2, total_step=9, target_modules=["two", "mid"])
    theirs = peft_of(base, made)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    weft.load(mine, tmp_path / "theirs")
    assert distance(mine(X), theirs(X)) <= LIMIT
    weft.detach(model)
    moved(weft.attach(model, config("AdaLoRA", targets="conv")).parameters())
    weft.save(model, tmp_path / "all")
    assert not weft.inspect(tmp_path / "all").readable_by_peft
    weft.export(tmp_path / "all", "peft", tmp_path / "out")  # as LoRA
    with quiet():
        theirs = PeftModel.from_pretrained(pair()[0], str(tmp_path / "out")).eval()
    assert distance(theirs(X), model(X)) <= LIMIT


class Others(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.odd, self.even = layer, nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.even(self.odd(x))


@pytest.mark.parametrize(
    ("layer", "says"),
    [
        (lambda: nn.Conv2d(4, 4, 3, groups=2), "2 groups"),
        (lambda: nn.Conv2d(4, 4, 3, dilation=2), "a dilation of (2, 2)"),
        (lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "padding by 'reflect'"),
        (lambda: nn.ConvTranspose2d(4, 4, 3), "a transposed kernel"),
    ],
)
@pytest.mark.parametrize("name", ["LoRA", "DoRA"])
def test_what_peft_cannot_hold_stays_in_wefts_format_and_is_refused_by_name(
    layer, says, name, tmp_path
):
    torch.manual_seed(0)
    model, x = Others(layer()), torch.randn(2, 4, 7, 7)
    fresh = Others(layer())
    fresh.load_state_dict(model.state_dict())
    moved(weft.attach(model, config(name, targets="conv")).parameters())
    weft.save(model, tmp_path / "mine")
    assert not weft.inspect(tmp_path / "mine").readable_by_peft
    weft.load(fresh, tmp_path / "mine")
    assert torch.equal(fresh(x), model(x))
    with pytest.raises(weft.UnsupportedError) as refused:
        weft.export(tmp_path / "mine", "peft", tmp_path / "out")
    assert f"peft cannot hold the convolution 'odd': it has {says}" in str(refused.value)


def test_a_file_of_peft_on_a_layer_where_it_means_something_else_is_refused(tmp_path):
    base, _ = pair()
    peft_of(base, LoraConfig(r=2, target_modules=["two"])).save_pretrained(str(tmp_path))
    for changes in ({"dilation": 2}, {"padding_mode": "circular"}):
        with pytest.raises(
            weft.CheckpointError, match=r"'two' is a convolution of 3 x 2 over 3 channels"
        ):
            weft.load(Net(**changes), tmp_path)
    torch.manual_seed(0)
    grouped = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    folder = tmp_path / "groups"
    peft_of(grouped, LoraConfig(r=2, target_modules=["0"])).save_pretrained(str(folder))
    with pytest.raises(weft.CheckpointError, match=r"over 4 channels in the file, .*2 groups"):
        weft.load(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: {**t, "A": t["A"].flatten(1)},
        lambda t: {**t, "B": t["B"].flatten(1)},
        lambda t: {**t, "A": t["A"][..., :1]},
        lambda t: {**t, "A": t["A"].transpose(2, 3)},
        lambda t: {**t, "B": t["B"].expand(-1, -1, 2, 2).contiguous()},
        lambda t: {**t, "m": t["m"].transpose(0, 1).contiguous()},
        lambda t: {**t, "m": t["m"].flatten()},
        lambda t: {k: v for k, v in t.items() if k != "B"},
    ],
)
def test_kernels_of_other_shapes_are_refused(change, tmp_path):
    base, mine = pair()
    peft_of(base, LoraConfig(r=2, use_dora=True, target_modules=["two"])).save_pretrained(
        str(tmp_path)
    )
    path = tmp_path / "adapter_model.safetensors"
    names = {"A": "lora_A.weight", "B": "lora_B.weight", "m": "lora_magnitude_vector"}
    keys = {short: f"base_model.model.two.{name}" for short, name in names.items()}
    tensors = load_file(path)
    new = change({short: tensors[key] for short, key in keys.items()})
    save_file({keys[k]: t.contiguous() for k, t in new.items()}, path)
    with pytest.raises(weft.CheckpointError):
        weft.load(mine, tmp_path)
    assert not weft.adapters(mine)


def test_a_start_at_the_weight_that_peft_does_not_have_is_refused(tmp_path):
    base, mine = pair()
    peft_of(base, LoraConfig(r=2, target_modules=["two"])).save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "init_lora_weights": "pissa"}))
    with pytest.raises(weft.UnsupportedError, match="on the convolution 'two'"):
        weft.load(mine, tmp_path)


def test_an_adapter_fits_the_kernel_that_it_was_trained_on(tmp_path):
    model = nn.Sequential(nn.Conv2d(4, 5, 3))
    weft.attach(model, weft.VeRA(r=3, targets="conv"))
    weft.save(model, tmp_path)
    for other in (nn.Conv2d(36, 5, 1), nn.Conv2d(4, 5, (9, 1)), nn.Linear(36, 5)):
        with pytest.raises(weft.CheckpointError, match="'0' is a convolution"):
            weft.load(nn.Sequential(other), tmp_path, other_base=True)
