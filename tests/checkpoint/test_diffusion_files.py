"""LoRA files of diffusers, of kohya's scripts and of LyCORIS: read exactly, or refused by name."""

import json
import re

import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from test_peft_convolutions import CONVOLUTIONS, LIMIT, X, pair, peft_of
from torch import nn

import weft
from support import distance
from weft.model.merge import effective_weight

DIFFUSERS = "pytorch_lora_weights.safetensors"


class Block(nn.Module):
    """A small part of a denoiser, with names as in diffusers."""

    def __init__(self):
        super().__init__()
        self.conv_in = nn.Conv2d(3, 4, 3, padding=1)
        self.down_blocks = nn.ModuleList([nn.ModuleDict({"conv1": nn.Conv2d(4, 6, 3, padding=1)})])
        self.to_q = nn.Linear(6, 5)
        self.proj_out = nn.Conv2d(5, 2, 1)

    def forward(self, x):
        h = torch.tanh(self.down_blocks[0]["conv1"](torch.tanh(self.conv_in(x))))
        return self.proj_out(self.to_q(h.movedim(1, -1)).movedim(-1, 1))


LAYERS = ["conv_in", "down_blocks.0.conv1", "to_q", "proj_out"]
IMAGES = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(5))


def block():
    torch.manual_seed(0)
    return Block()


def flat(name, prefix="lora_unet_"):
    return prefix + name.replace(".", "_")


def kohya(model, r=2, alpha=3.0, mid=(), dora=(), names=LAYERS, prefix="lora_unet_"):
    """A file's tensors, and W' of every layer in float64."""
    generator = torch.Generator().manual_seed(6)

    def draw(*shape):
        return torch.randn(*shape, generator=generator) / 3

    tensors, wanted = {}, {}
    for name in names:
        W, key = model.get_submodule(name).weight.detach(), flat(name, prefix)
        ones = (1,) * (W.ndim - 2)
        up = draw(W.shape[0], r, *ones)
        if name in mid:
            down, middle = draw(r, W.shape[1], *ones), draw(r, r, *W.shape[2:])
            A = torch.einsum("rjkl,ji->rikl", middle.double(), down.double().flatten(1))
            tensors[f"{key}.lora_mid.weight"] = middle
        else:
            down = draw(r, *W.shape[1:])
            A = down.double()
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        if alpha is not None:
            tensors[f"{key}.alpha"] = torch.tensor(alpha)
        s = 1.0 if alpha is None else alpha / r
        V = W.double().flatten(1) + s * up.double().flatten(1) @ A.flatten(1)
        if name in dora:
            m = draw(W.shape[0]).abs() + 0.5
            tensors[f"{key}.dora_scale"] = m.view(-1, 1, *ones)
            V = m.double()[:, None] * V / V.norm(dim=1, keepdim=True)
        wanted[name] = V
    return tensors, wanted


def loaded(tensors, folder, model=None, name="some_lora.safetensors", **more):
    model, path = block() if model is None else model, folder / name
    save_file({k: t.contiguous() for k, t in tensors.items()}, path)
    weft.load(model, path, **more)
    return model


def check(model, wanted, inside=""):
    for name, W in wanted.items():
        layer = model.get_submodule(inside + name)
        assert distance(effective_weight(layer), W) <= LIMIT, name


@pytest.mark.parametrize("alpha", [None, 3.0])
@pytest.mark.parametrize("mid", [(), ("down_blocks.0.conv1",)])
@pytest.mark.parametrize("dora", [(), LAYERS])
def test_a_file_of_kohya_or_lycoris_gives_its_own_weights(alpha, mid, dora, tmp_path):
    tensors, wanted = kohya(block(), alpha=alpha, mid=mid, dora=dora)
    model = loaded(tensors, tmp_path)
    check(model, wanted)
    adapter = weft.adapters(model)["default"]
    assert type(adapter.config) is (weft.DoRA if dora else weft.LoRA)
    assert bool(mid) == any("lora_mid" in note for note in adapter.load_report.notes)
    plain = block()
    layers = {n: wanted[n].view_as(plain.get_submodule(n).weight) for n in LAYERS}
    for name, W in layers.items():
        plain.get_submodule(name).weight.data.copy_(W)
    assert distance(model(IMAGES), plain(IMAGES)) <= LIMIT
    shown = weft.inspect(tmp_path / "some_lora.safetensors")
    assert shown.writer == "kohya" and not shown.readable_by_peft and len(shown.rows) == 4
    weft.save(model, tmp_path / "own")  # with the model's names, so that peft reads it
    again = block()
    weft.load(again, tmp_path / "own")
    assert torch.equal(again(IMAGES), model(IMAGES))
    assert weft.inspect(tmp_path / "own").readable_by_peft
    with pytest.raises(weft.UnsupportedError, match=r"kohya does not have the names"):
        weft.export(tmp_path / "some_lora.safetensors", "peft", tmp_path / "out")


def test_ranks_and_alphas_of_each_layer_count(tmp_path):
    first, wanted = kohya(block(), r=2, alpha=3.0, names=LAYERS[:2])
    second, others = kohya(block(), r=4, alpha=1.0, names=LAYERS[2:])
    model = loaded({**first, **second}, tmp_path)
    check(model, {**wanted, **others})


def test_the_model_may_be_the_pipeline_or_the_component(tmp_path):
    class Pipeline(nn.Module):
        def __init__(self):
            super().__init__()
            self.unet, self.text_encoder = block(), block()

    tensors, wanted = kohya(block())
    check(loaded(tensors, tmp_path, Pipeline()), wanted, "unet.")
    both = tensors | kohya(block(), prefix="lora_te_")[0]
    pipeline = loaded(both, tmp_path, Pipeline())
    check(pipeline, wanted, "unet.")
    check(pipeline, wanted, "text_encoder.")
    with pytest.raises(weft.CheckpointError, match=r"lora_unet_conv_in"):
        loaded(both, tmp_path)  # one layer cannot be two
    with pytest.raises(weft.CheckpointError, match=r"the model has no module 'lora_te2_conv_in'"):
        loaded(kohya(block(), prefix="lora_te2_")[0], tmp_path, Pipeline())


def test_a_name_that_means_two_modules_is_refused(tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a_b = nn.ModuleDict({"c": nn.Linear(3, 3)})
            self.a = nn.ModuleDict({"b_c": nn.Linear(3, 3)})

    tensors = {"lora_unet_a_b_c.lora_down.weight": torch.ones(1, 3)}
    tensors["lora_unet_a_b_c.lora_up.weight"] = torch.ones(3, 1)
    with pytest.raises(weft.CheckpointError, match=r"no module 'lora_unet_a_b_c'"):
        loaded(tensors, tmp_path, Twice())


BAD = {
    "magnitudes per input": (
        lambda t, k: {**t, f"{k}.dora_scale": torch.ones(1, 4, 1, 1)},
        "down_blocks.0.conv1",
        "one magnitude per input channel.*another method than DoRA",
    ),
    "magnitudes per input of a linear layer": (
        lambda t, k: {**t, f"{k}.dora_scale": torch.ones(1, 6)},
        "to_q",
        "one magnitude per input channel",
    ),
    "magnitudes of another shape": (
        lambda t, k: {**t, f"{k}.dora_scale": torch.ones(3, 1)},
        "to_q",
        r"dora_scale of 'lora_unet_to_q' has the shape \[3, 1\]; \[5, 1\]",
    ),
    "some with magnitudes": (
        lambda t, k: {**t, f"{k}.dora_scale": torch.ones(5, 1)},
        "to_q",
        "missing.*lora_magnitude_vector",
    ),
    "no up": (
        lambda t, k: {n: v for n, v in t.items() if n != f"{k}.lora_up.weight"},
        "to_q",
        "no B",
    ),
    "LoHa": (lambda t, k: {**t, f"{k}.hada_w1_a": torch.ones(2)}, "to_q", "LoHa"),
    "LoKr": (lambda t, k: {**t, f"{k}.lokr_w1": torch.ones(2)}, "to_q", "LoKr"),
    "full": (lambda t, k: {**t, f"{k}.diff": torch.ones(2)}, "to_q", "trained in full"),
    "scalar": (lambda t, k: {**t, f"{k}.scalar": torch.ones(())}, "to_q", "scalar"),
    "bias": (
        lambda t, k: {**t, f"{k}.lora_up.bias": torch.ones(5)},
        "to_q",
        "extra: .*lora_up.bias",
    ),
    "alpha of 0": (lambda t, k: {**t, f"{k}.alpha": torch.zeros(())}, "to_q", "one number above 0"),
    "two alphas": (lambda t, k: {**t, f"{k}.alpha": torch.ones(2)}, "to_q", "one number above 0"),
    "a mid of another size": (
        lambda t, k: {**t, f"{k}.lora_mid.weight": torch.ones(2, 3, 3, 3)},
        "down_blocks.0.conv1",
        "does not follow",
    ),
    "a linear layer's": (
        lambda t, k: {**t, f"{k}.lora_down.weight": torch.ones(2, 36)},
        "down_blocks.0.conv1",
        "lora_unet_down_blocks_0_conv1",
    ),
    "another kernel": (
        lambda t, k: {**t, f"{k}.lora_down.weight": torch.ones(2, 4, 9, 1)},
        "down_blocks.0.conv1",
        "of 9 x 1 over 4 channels in the file",
    ),
    "no number": (
        lambda t, k: {**t, f"{k}.lora_up.weight": torch.full((5, 2), torch.nan)},
        "to_q",
        r"'lora_unet_to_q.lora_up.weight'.*NaN",
    ),
    "another width": (
        lambda t, k: {**t, f"{k}.lora_up.weight": torch.ones(7, 2)},
        "to_q",
        r"lora_unet_to_q",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_meant_is_refused_in_the_files_words(case, tmp_path):
    change, name, says = BAD[case]
    tensors = change(kohya(block())[0], flat(name))
    model = block()
    with pytest.raises(weft.WeftError) as refused:
        loaded(tensors, tmp_path, model)
    assert re.search(says, str(refused.value), re.DOTALL), str(refused.value)
    assert not weft.adapters(model)


# diffusers


def diffusers_file(theirs, folder, component="unet.", metadata=True, form=lambda key: key):
    """As save_lora_weights of a pipeline and save_lora_adapter of a model write it."""
    tensors = get_peft_model_state_dict(theirs)
    tensors = {k.removeprefix("base_model.model."): t for k, t in tensors.items()}
    config = theirs.peft_config["default"].to_dict()
    plain = {component + k: list(v) if isinstance(v, set) else v for k, v in config.items()}
    said = {"lora_adapter_metadata": json.dumps(plain, indent=2, sort_keys=True)}
    folder.mkdir(exist_ok=True)
    save_file(
        {component + form(k): t.contiguous() for k, t in tensors.items()},
        folder / DIFFUSERS,
        {"format": "pt", **(said if metadata else {})},
    )
    return folder


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("component", ["", "unet."])
@pytest.mark.parametrize("rslora", [False, True])
def test_a_file_of_diffusers_with_its_configuration(dora, component, rslora, tmp_path):
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
    weft.load(mine, diffusers_file(theirs, tmp_path, component))
    assert distance(mine(X), theirs(X)) <= LIMIT
    shown = weft.inspect(tmp_path)
    assert shown.writer == "diffusers" and shown.config["alpha"] == 5.0


@pytest.mark.parametrize(
    "form",
    [
        lambda key: key,
        lambda key: key.replace("lora_A", "lora.down").replace("lora_B", "lora.up"),
        lambda key: key.replace("lora_A", "lora_linear_layer.down").replace(
            "lora_B", "lora_linear_layer.up"
        ),
        lambda key: key.replace("lora_A", "lora_down").replace("lora_B", "lora_up"),
    ],
)
def test_a_file_of_diffusers_without_its_configuration_has_the_rank_as_alpha(form, tmp_path):
    base, mine = pair()
    theirs = peft_of(base, LoraConfig(r=3, lora_alpha=3, target_modules=[*CONVOLUTIONS, "mid"]))
    weft.load(mine, diffusers_file(theirs, tmp_path, metadata=False, form=form))
    assert distance(mine(X), theirs(X)) <= LIMIT
    assert any("no alpha" in note for note in weft.adapters(mine)["default"].load_report.notes)


def test_names_of_attention_processors(tmp_path):
    model = nn.ModuleDict({"attn1": nn.ModuleDict({"to_q": nn.Linear(3, 4)})})
    model["attn1"]["to_out"] = nn.ModuleList([nn.Linear(4, 5)])
    tensors = {
        "unet.attn1.processor.to_q_lora.down.weight": torch.randn(2, 3),
        "unet.attn1.processor.to_q_lora.up.weight": torch.randn(4, 2),
        "unet.attn1.processor.to_out_lora.down.weight": torch.randn(2, 4),
        "unet.attn1.processor.to_out_lora.up.weight": torch.randn(5, 2),
    }
    loaded(tensors, tmp_path, model)
    for layer, name in ((model["attn1"]["to_q"], "q"), (model["attn1"]["to_out"][0], "out")):
        down, up = (
            tensors[f"unet.attn1.processor.to_{name}_lora.{s}.weight"] for s in ("down", "up")
        )
        assert distance(effective_weight(layer), layer.weight + up @ down) <= LIMIT


def test_files_of_diffusers_that_do_not_fit_are_refused(tmp_path):
    base, mine = pair()
    theirs = peft_of(base, LoraConfig(r=2, target_modules=["two"]))
    folder = diffusers_file(theirs, tmp_path / "a")
    tensors = load_file(folder / DIFFUSERS)
    text = {k.replace("unet.", "text_encoder."): t.clone() for k, t in tensors.items()}
    save_file({**tensors, **text}, folder / DIFFUSERS)
    with pytest.raises(weft.CheckpointError, match=r"(?s)is for text_encoder and unet.*no module"):
        weft.load(mine, folder)
    assert not weft.adapters(mine)
    theirs.peft_config["default"].init_lora_weights = "pissa"
    with pytest.raises(weft.UnsupportedError, match=r"init_lora_weights='pissa'"):
        weft.load(mine, diffusers_file(theirs, tmp_path / "b"))
    for said in ("{", "[]"):
        save_file(tensors, folder / DIFFUSERS, {"lora_adapter_metadata": said})
        with pytest.raises(weft.CheckpointError, match=r"lora_adapter_metadata"):
            weft.load(mine, folder)
    theirs.save_pretrained(str(tmp_path / "peft"))
    alone = tmp_path / "alone.safetensors"
    (tmp_path / "peft" / "adapter_model.safetensors").rename(alone)
    with pytest.raises(weft.CheckpointError, match=r"has no adapter_config.json"):
        weft.load(mine, alone)


def test_a_unet_of_diffusers_and_its_own_file(tmp_path):
    diffusers = pytest.importorskip("diffusers")

    def unet():
        torch.manual_seed(0)
        return diffusers.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=8,
            attention_head_dim=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ).eval()

    theirs, mine = unet(), unet()
    names = ["to_q", "conv1", "conv2", "proj_in", "conv_in", "time_emb_proj"]
    theirs.add_adapter(LoraConfig(r=3, lora_alpha=5, use_dora=True, target_modules=names))
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            p.add_(0.1 * torch.randn_like(p) if "lora_" in name else 0)
    theirs.save_lora_adapter(tmp_path)
    weft.load(mine, tmp_path)
    given = torch.randn(2, 4, 8, 8), torch.tensor([3, 5]), torch.randn(2, 5, 8)
    assert distance(mine(*given).sample, theirs(*given).sample) <= LIMIT
