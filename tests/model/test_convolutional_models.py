"""Whole models of convolutions: ResNet, ConvNeXt, a TinyViT-like hybrid and a small U-Net, trained two
steps, audited, saved, loaded, merged; and what "all-linear" says of them.
"""

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

import weft
from support import config, distance
from weft.inference.pretrained import dummy_inputs

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def resnet():
    return transformers.ResNetForImageClassification(
        transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic", num_labels=3
        )
    )


def convnext():
    return transformers.ConvNextForImageClassification(
        transformers.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, num_labels=3)
    )


class TinyViT(nn.Module):
    """As in TinyViT: a stem and an inverted bottleneck with a depthwise convolution, then attention with a
    local convolution beside the MLP.
    """

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.GELU()
        )
        self.conv1, self.bn = nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 16, 3, 2, 1, groups=16, bias=False)
        self.conv3 = nn.Conv2d(16, 8, 1, bias=False)
        self.norm = nn.LayerNorm(8)
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.local_conv = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        h = F.gelu(self.conv2(F.gelu(self.bn(self.conv1(self.stem(x))))))
        h = self.conv3(h)
        n, c, height, width = h.shape
        t = h.flatten(2).mT
        q, k, v = self.qkv(self.norm(t)).view(n, -1, 2, 12).transpose(1, 2).chunk(3, dim=-1)
        t = t + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        t = self.local_conv(t.mT.reshape(n, c, height, width)).flatten(2).mT
        return self.head((t + self.fc2(F.gelu(self.fc1(t)))).mean(1))


class UNet(nn.Module):
    """Down, through the middle, and up with a transposed convolution and a skip; group norms."""

    def __init__(self):
        super().__init__()
        self.conv_in = nn.Conv2d(3, 8, 3, padding=1)
        self.norm1, self.down = nn.GroupNorm(2, 8), nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.time = nn.Linear(4, 16)
        self.middle = nn.Conv2d(16, 16, 3, padding=2, dilation=2, padding_mode="circular")
        self.up = nn.ConvTranspose2d(16, 8, 3, stride=2, padding=1)
        self.conv_out = nn.Conv2d(16, 3, 3, padding="same", padding_mode="reflect")

    def forward(self, x):
        first = self.conv_in(x)
        h = self.down(F.silu(self.norm1(first)))
        h = self.middle(
            F.silu(h + self.time(x.mean((1, 2, 3))[:, None].expand(-1, 4))[..., None, None])
        )
        h = self.up(F.silu(h), output_size=first.shape[-2:])
        return self.conv_out(torch.cat([first, h], 1))


MODELS = {"ResNet": resnet, "ConvNeXt": convnext, "TinyViT": TinyViT, "U-Net": UNet}


def built(name):
    torch.manual_seed(0)
    model = MODELS[name]()
    with torch.no_grad():
        for p in model.parameters():  # ConvNeXt scales its blocks by 1e-6 at first
            p.add_(0.1 * torch.randn_like(p))
    return model


def output(model):
    out = model(IMAGES)
    return out if isinstance(out, torch.Tensor) else out.logits


@pytest.mark.parametrize("method", ["LoRA", "DoRA", "VeRA", "DVoRA", "LoRAFA"])
@pytest.mark.parametrize("name", MODELS)
def test_trained_audited_saved_loaded_and_merged(name, method, tmp_path):
    model, fresh = built(name), built(name).eval()
    base = output(fresh).detach()
    targets = "conv" if method in ("VeRA", "LoRAFA") else ["all-linear", "conv"]
    changes = {"freeze_batch_norm": True} if name in ("ResNet", "TinyViT") else {}
    adapter = weft.attach(model, config(method, r=2, targets=targets, **changes))
    convolutions = [n for n, m in fresh.named_modules() if isinstance(m, nn.modules.conv._ConvNd)]
    kinds = {row.name: row.kind for row in adapter.plan().rows}
    assert [n for n, kind in kinds.items() if kind == "convolution"] == convolutions
    assert (set(kinds.values()) == {"convolution"}) == (targets == "conv" or name == "ResNet")
    optimizer = torch.optim.AdamW(adapter.parameters(), 0.02)
    before = weft.snapshot(model)
    for _ in range(3):
        optimizer.zero_grad()
        output(model.train()).square().sum().backward()
        optimizer.step()
    weft.audit(model, before, weft.snapshot(model))
    wanted = output(model.eval()).detach()
    assert distance(wanted, base) > 1e-3
    weft.save(model, tmp_path)
    weft.load(fresh, tmp_path)
    assert torch.equal(output(fresh), wanted)
    weft.merge(fresh, verify=IMAGES)
    assert distance(output(fresh), wanted) <= 1e-4
    weft.unmerge(fresh)
    assert torch.equal(output(fresh), wanted)
    weft.detach(fresh)
    assert torch.equal(output(fresh), base)


def test_all_linear_alone_on_a_resnet_names_the_cure():
    with pytest.raises(weft.TargetError, match=r'targets="conv"'):
        weft.attach(resnet(), weft.LoRA())
    adapter = weft.attach(resnet(), weft.LoRA(targets=["all-linear", "conv"]))
    assert {row.kind for row in adapter.plan().rows} == {"convolution"}
    assert [f.name for f in adapter.plan().frozen] == ["classifier.1"]


@pytest.mark.parametrize("name", ["ConvNeXt", "TinyViT"])
def test_all_linear_alone_lists_the_convolutions_as_frozen(name):
    adapter = weft.attach(built(name), weft.LoRA())
    cold = {f.name for f in adapter.plan().frozen if f.kind == "convolution"}
    assert cold == {n for n, m in built(name).named_modules() if isinstance(m, nn.Conv2d)}


def test_weft_merge_has_images_to_verify_with_for_models_without_an_image_size():
    model = resnet().eval()
    adapter = weft.attach(model, weft.LoRA(r=2, targets="conv"))
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.3)
    report = weft.merge(model, verify=dummy_inputs(model))
    assert report.effect > 0 and report.output_error <= report.tolerance
