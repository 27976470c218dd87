"""Attention outputs, MLP outputs, norms and stacks of real architectures, written down by hand."""

import re

import pytest
import torch
from torch import nn

import weft
from architectures import ARCHITECTURES, transformer
from support import config, move
from weft.model.structure import Structure
from weft.model.structure.blocks import Block

# stack, attention outputs within a block, MLP output, norm behind the MLP (post-norm only), norm
# behind the stack
EXPECTED = {
    "gpt2": [("transformer.h", ["attn.c_proj"], "mlp.c_proj", None, "transformer.ln_f")],
    "opt": [
        (
            "model.decoder.layers",
            ["self_attn.out_proj"],
            "fc2",
            None,
            "model.decoder.final_layer_norm",
        )
    ],
    "gpt_neox": [
        (
            "gpt_neox.layers",
            ["attention.dense"],
            "mlp.dense_4h_to_h",
            None,
            "gpt_neox.final_layer_norm",
        )
    ],
    "llama": [("model.layers", ["self_attn.o_proj"], "mlp.down_proj", None, "model.norm")],
    "qwen3": [("model.layers", ["self_attn.o_proj"], "mlp.down_proj", None, "model.norm")],
    "gemma": [("model.layers", ["self_attn.o_proj"], "mlp.down_proj", None, "model.norm")],
    "phi": [("model.layers", ["self_attn.dense"], "mlp.fc2", None, "model.final_layernorm")],
    "t5": [
        (
            "encoder.block",
            ["layer.0.SelfAttention.o"],
            "layer.1.DenseReluDense.wo",
            None,
            "encoder.final_layer_norm",
        ),
        (
            "decoder.block",
            ["layer.0.SelfAttention.o", "layer.1.EncDecAttention.o"],
            "layer.2.DenseReluDense.wo",
            None,
            "decoder.final_layer_norm",
        ),
    ],
    "bert": [
        ("bert.encoder.layer", ["attention.output.dense"], "output.dense", "output.LayerNorm", None)
    ],
    "roberta": [
        (
            "roberta.encoder.layer",
            ["attention.output.dense"],
            "output.dense",
            "output.LayerNorm",
            None,
        )
    ],
    "vit": [("vit.layers", ["attention.o_proj"], "mlp.fc2", None, "vit.layernorm")],
    "opt_post": [("model.decoder.layers", ["self_attn.out_proj"], "fc2", "final_layer_norm", None)],
    "distilbert": [
        (
            "distilbert.transformer.layer",
            ["attention.out_lin"],
            "ffn.lin2",
            "output_layer_norm",
            None,
        )
    ],
    "bart": [
        (
            f"model.{side}.layers",
            [f"{a}.out_proj" for a in attentions],
            "fc2",
            "final_layer_norm",
            None,
        )
        for side, attentions in (
            ("encoder", ["self_attn"]),
            ("decoder", ["self_attn", "encoder_attn"]),
        )
    ],
    "deberta": [
        (
            "deberta.encoder.layer",
            ["attention.output.dense"],
            "output.dense",
            "output.LayerNorm",
            None,
        )
    ],
    "gemma2": [("model.layers", ["self_attn.o_proj"], "mlp.down_proj", None, "model.norm")],
    "torch_post": [("layers", ["self_attn.out_proj"], "linear2", "norm2", "norm")],
    "torch_pre": [("layers", ["self_attn.out_proj"], "linear2", None, "norm")],
}
MORE = {
    "opt_post": transformer(
        "OPTForCausalLM",
        "OPTConfig",
        ffn_dim=44,
        word_embed_proj_dim=24,
        do_layer_norm_before=False,
    ),
    "distilbert": transformer(
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        dim=24,
        hidden_dim=44,
        n_layers=3,
        n_heads=3,
    ),
    "bart": transformer(
        "BartForConditionalGeneration",
        "BartConfig",
        d_model=24,
        encoder_ffn_dim=44,
        decoder_ffn_dim=44,
        encoder_layers=3,
        decoder_layers=3,
        encoder_attention_heads=3,
        decoder_attention_heads=3,
        decoder_start_token_id=2,
    ),
    # `encoder.LayerNorm` stands behind the list of blocks and normalises the relative positions
    "deberta": transformer(
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        relative_attention=True,
        position_buckets=8,
        norm_rel_ebd="layer_norm",
        pos_att_type=["p2c", "c2p"],
    ),
    # norms behind attention and MLP as well, before the residual sum
    "gemma2": transformer("Gemma2ForCausalLM", "Gemma2Config", num_key_value_heads=1, head_dim=8),
    **{
        f"torch_{when}": lambda first=when == "pre": nn.TransformerEncoder(
            nn.TransformerEncoderLayer(24, 3, 44, batch_first=True, norm_first=first),
            3,
            norm=nn.LayerNorm(24),
            enable_nested_tensor=False,
        )
        for when in ("pre", "post")
    },
}
MIXTURES = ["mixtral", "qwen3_moe", "qwen2_moe", "olmoe", "gpt_oss"]


def build(name):
    return MORE[name]() if name in MORE else ARCHITECTURES[name].build()


@pytest.mark.parametrize("name", list(EXPECTED))
def test_the_parts_of_every_block_are_those_counted_by_hand(name):
    model, wanted = build(name), []
    for stack, attentions, mlp, norm, _ in EXPECTED[name]:
        wanted += [
            Block(
                f"{stack}.{i}",
                stack,
                i,
                24,
                tuple(f"{stack}.{i}.{a}" for a in attentions),
                f"{stack}.{i}.{mlp}",
                norm and f"{stack}.{i}.{norm}",
            )
            for i in range(3)
        ]
    assert Structure.of(model).blocks == wanted
    for stack, *_, final in EXPECTED[name]:
        assert Structure.of(model).final_norm(stack) == final
    assert Structure.of(model).last_stack == EXPECTED[name][-1][0]


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_of_experts_has_an_attention_output_and_says_why_it_has_no_mlp_output(name):
    model = build(name)
    for block in Structure.of(model).blocks:
        assert (
            block.attention_outputs == (f"{block.name}.self_attn.o_proj",)
            and block.mlp_output is None
        )
        assert block.of("mlp-output") == block.of("block-output") == ()
    says = r"'model\.layers\.0' has none, since its MLP is a mixture of 5 experts .*no single output map.*attention-output"
    for preset in ("houlsby", "lin", "pfeiffer", "drop", "series", "parallel"):
        with pytest.raises(weft.TargetError, match=says):
            weft.attach(model, weft.Bottleneck(preset=preset, r=2))
    assert not weft.adapters(model)
    assert len(weft.attach(model, weft.Bottleneck(targets="attention-output", r=2)).sites) == 3


def test_experts_in_a_list_are_no_mlp_output_and_a_dense_block_beside_them_is():
    def block(experts):
        parts = {"attn": nn.ModuleDict({"q": nn.Linear(6, 6), "o": nn.Linear(6, 6)})}
        mlp = nn.ModuleDict({"up": nn.Linear(6, 8), "down": nn.Linear(8, 6)})
        many = nn.ModuleDict(
            {"gate": nn.Linear(6, 3), "experts": nn.ModuleList(nn.Linear(6, 6) for _ in range(3))}
        )
        return nn.ModuleDict({**parts, "mlp": many if experts else mlp})

    model = nn.ModuleDict({"layers": nn.ModuleList([block(False), block(True), block(True)])})
    adapter = weft.attach(model, weft.Bottleneck(r=2))
    assert list(adapter.sites) == [
        "layers.0.attn.o",
        "layers.0.mlp.down",
        "layers.1.attn.o",
        "layers.2.attn.o",
    ]
    assert {f.name: f.reason for f in adapter.frozen if f.kind == "block"} == {
        f"layers.{i}": "no mlp-output: its MLP is a mixture of 3 experts ('mlp.experts'), which "
        "has no single output map"
        for i in (1, 2)
    }
    assert "layers.{1..2} (block 6, x2)" in " ".join(str(adapter.plan()).split())


@pytest.mark.parametrize("name", list(EXPECTED))
def test_what_weft_has_added_is_no_part_of_a_block(name):
    model = build(name)
    before, stack = Structure.of(model).blocks, EXPECTED[name][-1][0]
    norm = Structure.of(model).final_norm(stack)
    torch_own = name.startswith("torch")  # whose attention output cannot be adapted
    weft.attach(model, weft.LoRA(r=2), name="norm")
    weft.attach(
        model, weft.Bottleneck(r=24, preset="lin" if torch_own else "houlsby"), name="attention"
    )
    weft.attach(model, weft.Bottleneck(r=24, preset="pfeiffer"), name="mlp")
    assert Structure.of(model).blocks == before and Structure.of(model).final_norm(stack) == norm
    for name in ("norm", "attention", "mlp"):
        weft.detach(model, name)
    assert Structure.of(model).blocks == before


def test_an_attention_output_that_cannot_be_adapted_says_why():
    with pytest.raises(
        weft.TargetError,
        match=r"targets='attention-output' means 'layers\.0\.self_attn\.out_proj', which "
        "cannot be adapted: MultiheadAttention reads this weight itself, and Bottleneck acts on",
    ):
        weft.attach(build("torch_post"), weft.Bottleneck(r=2))


@pytest.mark.parametrize("method", ["LoRA", "VeRA", "DoRA", "DVoRA"])
def test_the_roles_are_targets_of_every_rule(method):
    model = build("gpt2")
    for target, ending in (
        ("attention-output", r"attn\.c_proj"),
        ("mlp-output", r"mlp\.c_proj"),
        ("block-output", r"mlp\.c_proj"),
    ):
        adapter = weft.attach(model, config(method, targets=target))
        assert len(adapter.sites) == 3 and all(
            re.fullmatch(rf"transformer\.h\.\d\.{ending}", n) for n in adapter.sites
        )
        move(adapter)
        weft.detach(model)
    adapter = weft.attach(
        model, config(method, targets={"attention-output": {"r": 5}, "mlp-output": {}})
    )
    assert [site.method.r for site in adapter.sites.values()] == [5, 3] * 3


@pytest.mark.parametrize("method", ["LoRA", "VeRA", "DoRA", "DVoRA"])
def test_a_rule_of_weights_does_not_go_on_a_norm(method):
    model = build("bert")
    with pytest.raises(
        weft.TargetError,
        match=r"'bert\.encoder\.layer\.0\.output\.LayerNorm' is a layer norm \(LayerNorm\)"
        rf", and {method} adapts weight matrices",
    ):
        weft.attach(model, config(method, targets="block-output"))
    assert (
        not weft.adapters(model)
        and type(model.bert.encoder.layer[0].output.LayerNorm) is nn.LayerNorm
    )


def test_a_role_in_a_model_without_blocks_and_in_blocks_without_it():
    with pytest.raises(weft.TargetError, match="'mlp-output' finds no layer in this model"):
        weft.attach(nn.ModuleDict({"up": nn.Linear(4, 5)}), weft.Bottleneck(preset="lin", r=2))
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)))
    with pytest.raises(
        weft.TargetError, match="'0' has none, since it has no attention that ends in"
    ) as caught:
        weft.attach(model, weft.Bottleneck(r=2))
    assert str(caught.value).endswith("Name other layers.")
    assert list(weft.attach(model, weft.Bottleneck(preset="lin", r=2)).sites) == [
        "0.0",
        "1.0",
        "2.0",
    ]


def test_the_lowest_blocks_of_every_stack_are_skipped():
    model = build("t5")
    adapter = weft.attach(model, weft.Bottleneck(preset="drop", r=2, skip_layers=2))
    assert list(adapter.sites) == [
        "encoder.block.2.layer.1.DenseReluDense.wo",
        "decoder.block.2.layer.2.DenseReluDense.wo",
    ]
    reasons = {f.name: f.reason for f in adapter.frozen}
    assert reasons["encoder.block.1.layer.1.DenseReluDense.wo"] == "left out by skip_layers=2"
    assert reasons["encoder.block.2.layer.1.DenseReluDense.wi"] == "not named by targets"
    weft.detach(model)
    with pytest.raises(
        weft.TargetError, match="skip_layers=3 leaves nothing to adapt: the model has 3 blocks"
    ):
        weft.attach(model, weft.Bottleneck(preset="drop", r=2, skip_layers=3))
    with pytest.raises(weft.TargetError, match="the model has 0 blocks"):
        weft.attach(
            nn.ModuleDict({"up": nn.Linear(4, 5)}),
            weft.Bottleneck(r=2, skip_layers=1, targets=["up"]),
        )


@pytest.mark.parametrize(
    ("name", "reads"),
    [
        ("opt_post", True),
        ("torch_post", True),
        ("torch_pre", False),
        ("bart", True),
        ("gpt2", False),
    ],
)
def test_post_norm_is_what_the_model_really_computes(name, reads):
    """In a post-norm block the output is what its last norm gives; in a pre-norm block it is
    not.
    """
    model, seen = build(name).eval(), {}
    block = Structure.of(model).blocks[0]
    layer, norms = (
        model.get_submodule(block.name),
        [m for m in model.get_submodule(block.name).modules() if isinstance(m, nn.LayerNorm)],
    )
    for norm in norms:
        norm.register_forward_hook(lambda module, args, out: seen.update({id(module): out}))
    layer.register_forward_hook(
        lambda module, args, out: seen.update(block=out if torch.is_tensor(out) else out[0])
    )
    with torch.enable_grad():  # torch's fused kernel of eval mode calls no norm
        ids = torch.randint(3, 61, (2, 7))
        model(torch.randn(2, 7, 24)) if name.startswith("torch") else model(input_ids=ids)
    equal = [norm for norm in norms if torch.equal(seen[id(norm)], seen["block"])]
    assert bool(equal) == reads == (block.mlp_norm is not None)
    assert not reads or equal == [model.get_submodule(block.mlp_norm)]


def test_a_map_of_another_width_behind_the_output_is_not_the_output():
    def block():
        attention = nn.ModuleDict(
            {"q": nn.Linear(6, 4), "o": nn.Linear(4, 6), "gate": nn.Linear(6, 4)}
        )
        return nn.ModuleDict(
            {
                "attn": attention,
                "up": nn.Linear(6, 8),
                "down": nn.Linear(8, 6),
                "score": nn.Linear(6, 1),
            }
        )

    model = nn.ModuleDict({"layers": nn.ModuleList([block(), block()])})
    assert [(*b.attention_outputs, b.mlp_output) for b in Structure.of(model).blocks] == [
        (f"layers.{i}.attn.o", f"layers.{i}.down") for i in (0, 1)
    ]
