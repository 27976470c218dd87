"""`targets` in every form, on plain torch models too; what matches nothing names what there is."""

import pytest
import torch
from torch import nn

import weft
from architectures import ARCHITECTURES
from support import config, inputs, move, net


class Block(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.attn = nn.ModuleDict({"q_proj": nn.Linear(width, 4), "v_proj": nn.Linear(width, 4)})
        self.up, self.down = nn.Linear(width, 10), nn.Linear(10, width)


class Plain(nn.Module):
    """A transformer of nobody's library: embedding, two blocks, a projection, a head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(13, 6)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.project = nn.Linear(6, 7)
        self.head = nn.Linear(7, 3)


def sites(model, targets, method="LoRA"):
    found = list(weft.attach(model, config(method, targets=targets)).sites)
    weft.detach(model)
    return found


ATTENTION = [
    "blocks.0.attn.q_proj",
    "blocks.0.attn.v_proj",
    "blocks.1.attn.q_proj",
    "blocks.1.attn.v_proj",
]
MLP = ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]


@pytest.mark.parametrize(
    ("targets", "wanted"),
    [
        ("all-linear", [*ATTENTION[:2], *MLP[:2], *ATTENTION[2:], *MLP[2:], "project"]),
        ("attention", ATTENTION),
        ("mlp", MLP),
        (["attention", "project"], [*ATTENTION, "project"]),
        ("q_proj", ATTENTION[0::2]),
        (
            ["q_proj", "down"],
            ["blocks.0.attn.q_proj", "blocks.0.down", "blocks.1.attn.q_proj", "blocks.1.down"],
        ),
        (("attn.q_proj",), ATTENTION[0::2]),
        ({"up", "head"}, ["blocks.0.up", "blocks.1.up", "head"]),
        ("blocks.1.up", ["blocks.1.up"]),
        (r"blocks\.\d+\.(up|down)", MLP),
        (r".*\.0\..*proj", ATTENTION[:2]),
        (["embed", "head"], ["embed", "head"]),
        ({"project": {}, r".*q_proj": {"r": 2}}, [*ATTENTION[0::2], "project"]),
    ],
)
def test_every_form_of_targets(targets, wanted):
    assert sites(Plain(), targets) == wanted


@pytest.mark.parametrize(
    ("targets", "says"),
    [
        (
            "p_proj",
            (
                r"'p_proj' matches none of the model's 11 linear layers\. Nearest endings: \['v_proj', "
                r"'q_proj'"
            ),
        ),
        (["q_proj", "blocks.2.up"], r"'blocks\.2\.up' matches none .* Nearest endings: \['up'"),
        (
            "xyzzy",
            r"Nearest endings: \['down', 'embed', 'head', 'project', 'q_proj', 'up', 'v_proj'\]",
        ),
        (r".*\.quary.*", r"\(as a regular expression over the whole name\)"),
        ("proj", "matches none"),  # an ending is cut at a dot
        ("q_pro", "matches none"),
    ],
)
def test_a_pattern_that_matches_nothing_names_candidates(targets, says):
    model = Plain()
    with pytest.raises(weft.TargetError, match=says):
        weft.attach(model, weft.LoRA(targets=targets))
    assert not weft.adapters(model)


def test_keywords_that_find_nothing_say_what_was_left_out():
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "head": nn.Linear(4, 3)})
    with pytest.raises(
        weft.TargetError,
        match=r"'mlp' finds no layer in this model\. It leaves out: embed: embedding\. "
        r"Name what you want to adapt; .*\['embed', 'head'\]",
    ):
        weft.attach(model, weft.LoRA(targets="mlp"))


def test_overrides_per_layer_and_the_later_pattern_wins_field_by_field():
    model = Plain()
    adapter = weft.attach(
        model,
        weft.DoRA(
            r=4,
            alpha=8,
            targets={
                "all-linear": {},
                "q_proj": {"r": 9, "alpha": 3.0},
                r"blocks\.1\..*": {"r": 2, "norm_grad": "exact"},
            },
        ),
    )
    rules = {
        name: (site.method.r, site.method.alpha, site.method.norm_grad)
        for name, site in adapter.sites.items()
    }
    assert rules["project"] == rules["blocks.0.up"] == (4, 8, "constant")
    assert rules["blocks.0.attn.q_proj"] == (9, 3.0, "constant")
    assert rules["blocks.1.attn.q_proj"] == (2, 3.0, "exact") and rules["blocks.1.down"] == (
        2,
        8,
        "exact",
    )
    assert adapter.sites["blocks.0.attn.q_proj"].A.shape == (9, 6)
    with pytest.raises(
        weft.ConfigError, match=r"LoRA has no field 'rank' to override per layer\. Nearest: "
    ):
        weft.attach(Plain(), weft.LoRA(targets={"q_proj": {"rank": 3}}))
    with pytest.raises(weft.ConfigError, match=r"LoRA\(r=0\)"):
        weft.attach(Plain(), weft.LoRA(targets={"q_proj": {"r": 0}}))


def test_a_head_by_convention_is_left_out_of_a_plain_model():
    assert "head" not in sites(Plain(), "all-linear")
    assert set(weft.attach(Plain(), weft.Head()).selected) == {"head.weight", "head.bias"}
    alone = nn.ModuleDict({"head": nn.Linear(4, 3)})  # with nothing beside it, it is the model
    assert sites(alone, "all-linear") == ["head"]


def test_a_pair_of_linear_layers_is_no_block():
    model = nn.Sequential(nn.Linear(7, 11), nn.Tanh(), nn.Linear(11, 5))
    assert sites(model, "all-linear") == ["0", "2"]
    with pytest.raises(weft.TargetError, match="'attention' finds no layer"):
        weft.attach(model, weft.LoRA(targets="attention"))


def test_multihead_attention_is_a_linear_map_that_its_module_reads():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(6, 2), "up": nn.Linear(6, 7)})
    adapter = weft.attach(model, weft.LoRA(r=2))
    assert list(adapter.sites) == ["attention.in_proj_weight", "attention.out_proj", "up"]
    assert not adapter.frozen


@pytest.mark.parametrize("batch_first", [False, True])
def test_a_transformer_encoder_of_torch(batch_first):
    layer = nn.TransformerEncoderLayer(6, 2, 10, batch_first=batch_first)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    wanted = [f"layers.{i}.linear{j}" for i in range(3) for j in (1, 2)]
    assert sites(model, "mlp") == wanted
    held = [f"layers.{i}.self_attn.{n}" for i in range(3) for n in ("in_proj_weight", "out_proj")]
    assert sites(model, "attention") == held
    assert sorted(sites(model, "all-linear")) == sorted(held + wanted)
    adapter = weft.attach(model, weft.LoRA(r=2, dropout=0.1))
    assert list(adapter.sites) == wanted
    assert "layers.{0..2}.self_attn.in_proj_weight (weight 18x6, x3)" in str(adapter.plan())


def _quantised():
    layer = nn.Linear(4, 5)
    layer.weight = nn.Parameter(torch.zeros(5, 4, dtype=torch.int8), requires_grad=False)
    return layer


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (lambda: nn.utils.parametrizations.weight_norm(nn.Embedding(4, 5)), "parametrised"),
        (lambda: nn.Embedding(4, 5, max_norm=1.0), "max_norm rewrites its weight"),
        (_quantised, r"quantised \(int8\)"),
        (
            lambda: _Scaled(4, 5),
            "the forward of _Scaled computes something else than a plain embedding layer",
        ),
        (
            lambda: _Doubling(4, 5),
            "the forward of _Doubling computes something else than a plain linear layer",
        ),
        (lambda: _TwoInputs(4, 5), "the forward of _TwoInputs computes something else"),
    ],
)
def test_layers_that_cannot_be_adapted_say_why(layer, reason):
    model = nn.ModuleDict({"first": layer(), "second": nn.Linear(4, 5)})
    adapter = weft.attach(model, weft.LoRA(r=2))
    assert list(adapter.sites) == ["second"]
    assert any(f.name == "first" for f in adapter.frozen)
    with pytest.raises(weft.TargetError, match=f"'first'.* cannot be adapted: .*{reason}"):
        weft.attach(model, weft.LoRA(targets=["first"]), name="b")


class _Scaled(nn.Embedding):
    def forward(self, ids):
        return 3 * super().forward(ids)


class _Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class _TwoInputs(nn.Linear):
    def forward(self, x, gate):
        return gate * super().forward(x)


class _Spelled(nn.Linear):
    """The same map, written out: some models do so."""

    def forward(self, x):
        return x @ self.weight.T + self.bias


def test_a_subclass_that_computes_the_same_map_is_adapted():
    model = nn.ModuleDict({"layer": _Spelled(7, 11)})
    adapter = weft.attach(model, config("DoRA", targets="all-linear"))
    move(adapter)
    x = inputs("linear")
    W = weft.effective_weight(model["layer"])
    torch.testing.assert_close(model["layer"](x), x @ W.T + model["layer"].bias)
    assert type(model["layer"]).__name__ == "Adapted_Spelled" and isinstance(
        model["layer"], _Spelled
    )


def test_lazy_layers_are_refused_until_they_have_a_shape():
    model = nn.Sequential(nn.LazyLinear(5), nn.Linear(5, 4))
    with pytest.raises(
        weft.TargetError, match=r"'0\.weight' has no shape before the model's first forward"
    ):
        weft.attach(model, weft.LoRA(r=2))
    model(torch.randn(2, 7))
    assert sites(model, "all-linear") == ["0", "1"]


class Mixture(nn.Module):
    """Experts in a list, a router beside them, and a key projection with as many rows as there are
    experts.
    """

    def __init__(self, experts=4):
        super().__init__()
        self.self_attn = nn.ModuleDict(
            {"k_proj": nn.Linear(6, experts, bias=False), "o_proj": nn.Linear(experts, 6)}
        )
        self.gate = nn.Linear(6, experts, bias=False)
        self.experts = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(6, 8), "down": nn.Linear(8, 6)}) for _ in range(experts)
        )
        self.shared_expert = nn.ModuleDict({"up": nn.Linear(6, experts)})


def test_experts_in_a_list_are_adapted_and_their_router_is_not():
    model = nn.ModuleDict({"layers": nn.ModuleList([Mixture(), Mixture()])})
    adapter = weft.attach(model, weft.LoRA(r=2))
    assert len(adapter.sites) == 2 * (2 + 8 + 1)
    assert {f.name: f.reason for f in adapter.frozen} == {
        f"layers.{i}.gate": "router of a mixture of experts" for i in range(2)
    }
    assert len(adapter.routed) == 16 and all(".experts." in name for name in adapter.routed)
    weft.detach(model)
    assert len(sites(model, "attention")) == 4 and len(sites(model, "mlp")) == 18


def test_routers_and_fused_experts_named_on_purpose():
    model = nn.ModuleDict({"layers": nn.ModuleList([Mixture()])})
    assert sites(model, ["gate"]) == ["layers.0.gate"]
    fused = ARCHITECTURES["mixtral"].build()
    assert sites(fused, ["gate_up_proj"]) == [
        f"model.layers.{i}.mlp.experts.gate_up_proj" for i in range(3)
    ]


def test_modules_to_save_by_ending_whole_name_and_not_at_all():
    model = Plain()
    adapter = weft.attach(
        model, config("LoRA", targets="attention", modules_to_save=["head", "blocks.0.up"])
    )
    assert set(adapter.selected) == {
        "head.weight",
        "head.bias",
        "blocks.0.up.weight",
        "blocks.0.up.bias",
    }
    assert adapter.num_head_parameters == 7 * 3 + 3 + 6 * 10 + 10
    assert not {"head", "blocks.0.up"} & {f.name for f in adapter.frozen}, (
        "what is trained does not stay frozen"
    )
    assert "head (" not in str(adapter.plan()).partition("stays frozen")[2]
    with pytest.raises(
        weft.TargetError,
        match=r"modules_to_save=\['classifier'\] matches no module.*end in: .*head",
    ):
        weft.attach(Plain(), config("LoRA", targets="mlp", modules_to_save=["classifier"]))
    with pytest.raises(
        weft.TargetError, match=r"'head' is named by targets and by modules_to_save"
    ):
        weft.attach(Plain(), config("LoRA", targets=["head"], modules_to_save=["head"]))


def test_both_sides_of_a_tied_pair_can_be_trained_together():
    model = net()
    model.head = nn.Linear(9, 11, bias=False)
    model.mid = nn.Linear(11, 9, bias=False)
    model.head.weight = nn.Parameter(torch.randn(11, 9))
    model.other = nn.Embedding(11, 9)
    model.other.weight = model.head.weight
    with pytest.raises(
        weft.TargetError, match=r"'head\.weight' is tied to 'other\.weight'.*Name both"
    ):
        weft.attach(model, config("LoRA", targets=["layer"], modules_to_save=["head"]))
    with pytest.raises(
        weft.TargetError, match=r"'other\.weight' is tied to 'head\.weight'.*Name both"
    ):
        weft.attach(model, config("LoRA", targets=["layer"], modules_to_save=["other"]))
    adapter = weft.attach(
        model, config("LoRA", targets=["layer"], modules_to_save=["head", "other"])
    )
    assert model.head.weight is model.other.weight is next(iter(adapter.selected.values()))
    assert len(adapter.selected) == 1
    with weft.use(model, None):
        assert model.head.weight is model.other.weight and not model.head.weight.requires_grad


def test_a_weight_read_by_a_module_under_another_name_counts_as_tied():
    model = net()
    model.register_parameter("table", model.mid.weight)
    with pytest.raises(
        weft.TargetError,
        match=r"'mid' and 'table' are tied: .* model\.table = torch\.nn\.Parameter",
    ):
        weft.attach(model, config("LoRA"))


class Wrapper(nn.Module):
    """As FSDP and activation checkpointing wrap a layer; torch.compile does too."""

    def __init__(self, inner, part):
        super().__init__()
        self.add_module(part, inner)

    def forward(self, x):
        return next(self.children())(x)


@pytest.mark.parametrize(
    "part", ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"]
)
def test_a_wrapped_layer_is_named_as_if_it_were_not_wrapped(part):
    model = net()
    model.mid = (
        torch.compile(model.mid, backend="eager")
        if part == "_orig_mod"
        else Wrapper(model.mid, part)
    )
    inside = f"mid.{part}"
    for targets in (["mid"], "mid", r"m[i]d", r"mid(\..*)?", [inside], {"mid": {"r": 2}}):
        assert sites(model, targets) == [inside], targets
    assert sites(model, "all-linear") == ["layer", inside]
    with pytest.raises(weft.TargetError, match=r"Nearest endings: \['mid'\]"):
        sites(model, ["mod"])
    adapter = weft.attach(model, config("LoRA", targets=["mid"]))
    move(adapter)
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        with weft.use(model, None):
            before = model(inputs("linear"))
        assert not torch.equal(model(inputs("linear")), before)
