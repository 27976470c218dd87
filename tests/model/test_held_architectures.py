"""Models of torch's own attention and recurrent layers: trained, audited, saved, loaded, merged."""

import copy

import pytest
import torch
from torch import nn

import weft
from support import distance

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")

WIDTH = 16


class Encoder(nn.Module):
    """nn.TransformerEncoder under an embedding; in eval mode torch takes its fused kernels."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 20, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, ids):
        hidden = self.encoder(self.embed(ids), src_key_padding_mask=ids == 0)
        return self.head(hidden.mean(1))


class Block(nn.Module):
    """A block of torchvision's ViT."""

    def __init__(self):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.self_attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 20), nn.GELU(), nn.Linear(20, WIDTH))

    def forward(self, x):
        y = self.ln_1(x)
        x = x + self.self_attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class Vision(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv_proj = nn.Conv2d(3, WIDTH, 4, 4)
        self.pos_embedding = nn.Parameter(torch.randn(1, 4, WIDTH) * 0.02)
        self.layers = nn.Sequential(*(Block() for _ in range(2)))
        self.ln, self.heads = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, images):
        x = self.conv_proj(images).flatten(2).mT + self.pos_embedding
        return self.heads(self.ln(self.layers(x)).mean(1))


class Residual(nn.Module):
    """A block of open_clip, whose attention has the sequence first."""

    def __init__(self):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = nn.MultiheadAttention(WIDTH, 2)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 20), nn.GELU(), nn.Linear(20, WIDTH))

    def forward(self, x, mask=None):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.resblocks = nn.ModuleList(Residual() for _ in range(2))
        self.ln, self.proj = nn.LayerNorm(WIDTH), nn.Parameter(torch.randn(WIDTH, 6) * 0.2)

    def forward(self, x, mask=None):
        x = x.transpose(0, 1)
        for block in self.resblocks:
            x = block(x, mask)
        return nn.functional.normalize(self.ln(x[-1]) @ self.proj, dim=-1)


class Clip(nn.Module):
    """Two towers of open_clip's shape."""

    def __init__(self):
        super().__init__()
        self.visual, self.text = Tower(), Tower()
        self.patches, self.token_embedding = nn.Linear(48, WIDTH), nn.Embedding(11, WIDTH)

    def forward(self, images):
        patches = images.unfold(2, 4, 4).unfold(3, 4, 4).flatten(4).permute(0, 2, 3, 1, 4)
        ids = (images[:, 0, 0] * 5).abs().long().clamp(max=10)
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        text = self.text(self.token_embedding(ids), mask)
        return self.visual(self.patches(patches.flatten(3).flatten(1, 2))) @ text.t()


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, WIDTH)
        self.lstm = nn.LSTM(WIDTH, 6, batch_first=True, bidirectional=True)
        self.tags = nn.Linear(12, 4)

    def forward(self, ids):
        packed = nn.utils.rnn.pack_padded_sequence(
            self.embed(ids), (ids != 0).sum(1), batch_first=True, enforce_sorted=False
        )
        return self.tags(nn.utils.rnn.pad_packed_sequence(self.lstm(packed)[0], True)[0])


IDS = torch.tensor([[3, 4, 5, 6, 7], [3, 9, 0, 0, 0], [8, 2, 1, 0, 0]])
IMAGES = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
CASES = {
    "encoder": (Encoder, IDS, "all-linear", 8),
    "vision": (Vision, IMAGES, "all-linear", 8),
    "clip": (Clip, IMAGES, ["attn", "proj"], 10),
    "tagger": (Tagger, IDS, ["lstm"], 4),
}


def made(case):
    torch.manual_seed(0)
    return CASES[case][0]()


@pytest.mark.parametrize("method", ["LoRA", "DoRA", "DVoRA"])
@pytest.mark.parametrize("case", CASES)
def test_two_steps_an_audit_a_file_and_a_merge(case, method, tmp_path):
    _, x, targets, layers = CASES[case]
    model = made(case)
    before_attach = copy.deepcopy(model)
    adapter = weft.attach(model, getattr(weft, method)(r=2, targets=targets))
    assert len(adapter.layers) == layers
    assert adapter.num_parameters == adapter.plan().trainable
    optimiser = torch.optim.AdamW(adapter.parameters(), 1e-2)
    before = weft.snapshot(model)
    losses = []
    for _ in range(3):
        loss = (model(x) - 1).square().mean()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss.detach()))
    weft.audit(model, before, weft.snapshot(model))
    assert losses[-1] < losses[0]
    model.eval()
    with torch.no_grad():
        wanted = model(x)
        weft.save(model, tmp_path)
        again = copy.deepcopy(before_attach).eval()
        assert distance(again(x), wanted) > 1e-4
        weft.load(again, tmp_path)
        assert torch.equal(again(x), wanted)
        report = weft.merge(again, verify=(x,))
        assert report.weights == layers
        weft.unmerge(again)
        assert torch.equal(again(x), wanted)


def test_the_fused_kernels_of_an_encoder_read_the_adapted_weights():
    model = made("encoder").eval()
    names = [n for n, _ in model.named_modules() if n.endswith("self_attn")]
    adapter = weft.attach(model, weft.DoRA(r=2, targets=["self_attn"]))
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.1)
        fused = model(IDS)
    plain = model(IDS)  # with gradients torch takes no fused kernel
    assert len(names) == 2 and distance(fused, plain) < 1e-5
    with torch.no_grad(), weft.use(model, None):
        assert distance(model(IDS), fused) > 1e-3


@pytest.mark.parametrize("case", ["encoder", "vision"])
def test_one_adapter_per_row_of_a_whole_model(case):
    _, x, targets, _ = CASES[case]
    model = made(case).eval()
    for name, method in (("a", "LoRA"), ("b", "DVoRA")):
        adapter = weft.attach(model, getattr(weft, method)(r=2, targets=targets), name)
        with torch.no_grad():
            for p in adapter.parameters():
                p.add_(0.05 * torch.randn_like(p))
    names = ["b", None, "a"]
    with torch.no_grad():
        wanted = {}
        for name in names:
            with weft.use(model, name):
                wanted[name] = model(x)
        with weft.use(model, names):
            found = model(x)
    assert distance(found, torch.stack([wanted[n][i] for i, n in enumerate(names)])) < 1e-5
    assert distance(wanted["a"], wanted["b"]) > 1e-3


def test_a_compiled_model_and_one_of_functorch():
    model = made("vision").eval()
    adapter = weft.attach(model, weft.DoRA(r=2))
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.05 * torch.randn_like(p))
    wanted = model(IMAGES)
    own = dict(model.named_parameters())
    found = torch.func.functional_call(model, own, (IMAGES,))
    assert torch.equal(found, wanted)
    compiled = torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True)
    assert distance(compiled(IMAGES), wanted) < 1e-5


@pytest.mark.parametrize("method", ["LoRA", "DVoRA"])
def test_new_tokens_beside_weights_that_a_module_reads(method, tmp_path):
    """Only the added rows of the table move, in the model and in the file."""
    model, table = made("tagger"), made("tagger").embed.weight.detach()
    adapter = weft.attach(model, getattr(weft, method)(r=2, targets=["lstm"], new_tokens=[8, 9]))
    rows = adapter.token_rows["embed"]
    optimiser = torch.optim.AdamW(adapter.parameters(), 1e-2, weight_decay=0.1)
    for _ in range(3):
        model(IDS).square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()
    assert torch.equal(model.embed.weight, table) and not torch.equal(rows, table[8:10])
    weft.save(model, tmp_path)
    with torch.no_grad():
        wanted = model.eval()(IDS)
        again = made("tagger").eval()
        weft.load(again, tmp_path)
        assert torch.equal(again(IDS), wanted)
        weft.merge(again, verify=(IDS,))
        changed = (again.embed.weight != table).any(1).nonzero().flatten().tolist()
    assert changed == [8, 9]
