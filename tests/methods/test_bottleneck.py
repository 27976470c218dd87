"""Bottleneck adapters: presets, places, the norm of post-norm models, and everything else that a
handle can do.
"""

import copy
import dataclasses
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import oracle
import weft
from architectures import ARCHITECTURES
from support import check_close, config, distance, inputs, move, net, same_bits
from weft import methods
from weft.methods.bottleneck import PRESETS
from weft.model.structure import Structure

FAMILIES = ["gpt2", "opt", "llama", "t5", "bert", "roberta", "vit"]
EACH = pytest.mark.parametrize("preset", list(PRESETS))
ON_A_NORM = [("bert", "pfeiffer"), ("roberta", "drop")]


def adapted(name, preset, at=torch.float32, **changes):
    """A small model of an architecture under a moved adapter, and its inputs."""
    model = ARCHITECTURES[name].build().to(at)
    given = {
        k: v.to(at) if v.is_floating_point() else v
        for k, v in ARCHITECTURES[name].inputs(rows=3).items()
    }
    skip = {"skip_layers": 1} if preset == "drop" else {}
    adapter = weft.attach(
        model, config("Bottleneck", **{"preset": preset, "targets": None, **skip, **changes})
    )
    move(adapter)
    return model, adapter, given


def output(model, given):
    return model(**given).logits


@EACH
@pytest.mark.parametrize("name", FAMILIES)
def test_the_count_of_a_model_is_the_papers(name, preset):
    """L blocks of width d: two adapters a block for Houlsby, one for the others; T5's decoder has
    two attentions.
    """
    _, adapter, _ = adapted(name, preset)
    L, d, f, r = (6 if name == "t5" else 3), 24, (96 if name == "gpt2" else 44), 3
    one = 2 * d * r + r + d
    twice = 2 * L + (3 if name == "t5" else 0)
    wanted = {
        "houlsby": twice * one,
        "lin": L * one + 2 * L * d,
        "pfeiffer": L * one,
        "drop": (L - (2 if name == "t5" else 1)) * one,
        "series": L * 2 * d * r,
        "parallel": L * r * (f + d),
    }
    assert adapter.num_parameters == wanted[preset] == adapter.plan().trainable
    assert adapter.num_head_parameters == 0


@EACH
@pytest.mark.parametrize("name", FAMILIES)
def test_it_starts_at_the_base_moves_and_comes_off(name, preset):
    model = ARCHITECTURES[name].build()
    given = ARCHITECTURES[name].inputs()
    with torch.no_grad():
        before = output(model, given)
        skip = {"skip_layers": 1} if preset == "drop" else {}
        adapter = weft.attach(model, weft.Bottleneck(preset=preset, r=3, **skip))
        assert same_bits(output(model, given), before)
        move(adapter)
        assert distance(output(model, given), before) > 1e-2
        with pytest.raises(
            weft.UnsupportedError,
            match=r"Bottleneck is not a change of weights, so .*: a nonlinearity",
        ):
            weft.merge(model)
        weft.detach(model)
        assert same_bits(output(model, given), before)


@pytest.mark.parametrize(
    ("name", "preset"), [*ON_A_NORM, ("bert", "houlsby"), ("gpt2", "pfeiffer"), ("llama", "lin")]
)
def test_every_adapted_layer_computes_the_equation(name, preset):
    """From what goes in, the frozen layer written out, and the oracle; on a norm, the norm of the
    sum with the update.
    """
    model, adapter, given = adapted(name, preset, torch.float64, dtype="float64")
    seen = {}
    for module in adapter.sites:
        model.get_submodule(module).register_forward_hook(
            lambda layer, args, out, module=module: seen.update(
                {module: (args[0].detach(), out.detach())}
            )
        )
    output(model, given)
    assert set(seen) == set(adapter.sites)
    for module, site in adapter.sites.items():
        (x, found), layer, t = (
            seen[module],
            site.base.module,
            {k: p.detach() for k, p in site.trainable().items()},
        )
        if site.base.kind == "norm":
            y = normalised(x, layer)
            wanted = normalised(x + oracle.bottleneck(x, y, t, site.method) - y, layer)
        else:
            y = x @ site.base.weight().detach().t() + (
                0 if layer.bias is None else layer.bias.detach()
            )
            wanted = oracle.bottleneck(x, y, t, site.method)
        check_close(found, wanted, torch.float64, module)
        assert distance(found, y) > 1e-2
    assert {s.base.kind for s in adapter.sites.values()} == {
        "norm" if (name, preset) in ON_A_NORM else "conv1d" if name == "gpt2" else "linear"
    }


def normalised(x, layer):
    middle = x - x.mean(dim=-1, keepdim=True)
    spread = (middle.pow(2).mean(dim=-1, keepdim=True) + layer.eps).sqrt()
    return middle / spread * layer.weight.detach() + layer.bias.detach()


@pytest.mark.parametrize(("name", "preset"), ON_A_NORM)
def test_gradients_on_a_norm_are_finite_differences(name, preset):
    model, adapter, given = adapted(
        name, preset, torch.float64, dtype="float64", nonlinearity="gelu"
    )
    output(model, given).pow(2).sum().backward()
    for key, p in adapter.named_parameters():
        direction, values, step = torch.randn_like(p), [], 1e-6
        for sign in (1, -2, 1):
            with torch.no_grad():
                p.add_(sign * step * direction)
                values.append(output(model, given).pow(2).sum())
        check_close(
            (p.grad * direction).sum(), (values[0] - values[1]) / (2 * step), torch.float32, key
        )


@pytest.mark.parametrize(
    ("name", "preset"), [*ON_A_NORM, ("t5", "houlsby"), ("llama", "parallel"), ("gpt2", "lin")]
)
def test_rows_of_bottlenecks_of_lora_and_of_the_base(name, preset):
    model, _, given = adapted(name, preset, torch.float64)
    move(weft.attach(model, config("LoRA", targets="all-linear"), name="lora"), seed=5)
    move(
        weft.attach(model, config("Bottleneck", preset="houlsby", targets=None, r=5), name="other"),
        seed=6,
    )
    asked = ["other", None, "default", "lora", "default"]
    rows = {k: v[[0, 0, 1, 2, 0]] for k, v in given.items()}
    with torch.no_grad():
        with weft.use(model, asked):
            mixed = output(model, rows)
        for i, which in enumerate(asked):
            with weft.use(model, which):
                check_close(
                    mixed[i],
                    output(model, {k: v[i : i + 1] for k, v in rows.items()})[0],
                    torch.float64,
                    which,
                )
        outputs = [mixed[i] for i in (0, 1, 4)]
        assert all(distance(a, b) > 1e-2 for i, a in enumerate(outputs) for b in outputs[:i])


@pytest.mark.parametrize(
    ("name", "preset"), [*ON_A_NORM, ("gpt2", "houlsby"), ("llama", "lin"), ("t5", "drop")]
)
def test_it_is_saved_loaded_and_inspected(name, preset, tmp_path):
    model, adapter, given = adapted(name, preset)
    with torch.no_grad():
        wanted = output(model, given)
    size = adapter.nbytes
    weft.save(model, tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size == size
    assert (
        json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "WEFT_BOTTLENECK"
    )
    other = ARCHITECTURES[name].build()
    loaded = weft.load(other, tmp_path)
    assert loaded.config == adapter.config and list(loaded.sites) == list(adapter.sites)
    with torch.no_grad():
        assert same_bits(output(other, given), wanted)
    about = weft.inspect(tmp_path)
    assert (
        about.method == "Bottleneck"
        and about.numbers == adapter.num_parameters
        and not about.readable_by_peft
    )
    assert {row.kind for row in about.rows} == {site.base.kind for site in adapter.sites.values()}
    assert f"preset={preset}" in " ".join(str(about).split())


def test_a_file_for_a_norm_does_not_land_on_a_map_and_a_deeper_base_is_refused(tmp_path):
    model, _, _ = adapted("bert", "pfeiffer")
    weft.save(model, tmp_path / "norm")
    other = ARCHITECTURES["bert"].build()
    for layer in other.bert.encoder.layer:
        layer.output.LayerNorm = nn.Linear(24, 24)
    with pytest.raises(
        weft.CheckpointError, match=r"a norm layer \[24, 24\].*the file.*a linear layer \[24, 24\]"
    ):
        weft.load(other, tmp_path / "norm")
    weft.detach(model)
    weft.attach(model, weft.Bottleneck(preset="drop", r=3, skip_layers=2))
    weft.save(model, tmp_path / "drop")
    loaded = weft.load(ARCHITECTURES["bert"].build(), tmp_path / "drop")
    assert list(loaded.sites) == ["bert.encoder.layer.2.output.LayerNorm"]
    deeper = ARCHITECTURES["bert"].build()
    deeper.bert.encoder.layer.append(copy.deepcopy(deeper.bert.encoder.layer[0]))
    with pytest.raises(
        weft.CheckpointError, match=r"nothing for 'bert\.encoder\.layer\.3\.output\.LayerNorm'"
    ):
        weft.load(deeper, tmp_path / "drop")


@pytest.mark.parametrize(
    ("name", "preset"), [*ON_A_NORM, ("gpt2", "houlsby"), ("llama", "parallel")]
)
def test_copies_checkpointing_and_compilation_compute_the_same(name, preset):
    model, adapter, given = adapted(name, preset)

    def gradients(run, handle):
        run().pow(2).mean().backward()
        found = {k: p.grad.clone() for k, p in handle.named_parameters()}
        for p in handle.parameters():
            p.grad = None
        return found

    wanted = gradients(lambda: output(model, given), adapter)
    with torch.no_grad():
        plain = output(model, given)
        other = copy.deepcopy(model)
        assert same_bits(output(other, given), plain)
        move(weft.adapters(other)["default"], seed=9)
        assert (
            same_bits(output(model, given), plain) and distance(output(other, given), plain) > 1e-2
        )
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for key, gradient in gradients(lambda: output(compiled, given), adapter).items():
        check_close(gradient, wanted[key], torch.float32, key)
    torch.compiler.reset()
    model.train()
    # The name of old is deprecated in transformers 5.24.
    enable = (
        getattr(model, "activation_checkpointing_enable", None)
        or model.gradient_checkpointing_enable
    )
    enable({"use_reentrant": False})
    for key, gradient in gradients(lambda: output(model, given), adapter).items():
        check_close(gradient, wanted[key], torch.float32, key)


@pytest.mark.parametrize(("name", "preset"), [*ON_A_NORM, ("gpt2", "houlsby"), ("llama", "lin")])
def test_a_bfloat16_model_and_autocast(name, preset):
    model, adapter, given = adapted(name, preset, torch.bfloat16)
    found = output(model, given)
    assert found.dtype == torch.bfloat16 and {p.dtype for p in adapter.parameters()} == {
        torch.float32
    }
    found.float().pow(2).mean().backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in adapter.parameters())
    plain, _, given = adapted(name, preset)
    with torch.no_grad():
        wanted = output(plain, given)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = output(plain, given)
    check_close(found, wanted, torch.bfloat16)
    check_close(inside, wanted, torch.bfloat16)


@pytest.mark.parametrize(
    ("name", "preset"),
    [("gpt2", "houlsby"), ("gpt2", "drop"), ("llama", "lin"), ("llama", "parallel")],
)
def test_generation_with_a_cache_is_that_without(name, preset):
    model, _, given = adapted(name, preset)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    ids = given["input_ids"]
    tokens = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    step = ids
    with torch.no_grad():
        for _ in range(6):
            step = torch.cat([step, model(input_ids=step).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(tokens, step)
    with weft.use(model, None):
        assert not torch.equal(
            model.generate(ids, attention_mask=torch.ones_like(ids), **settings), tokens
        )


@pytest.mark.parametrize(
    ("name", "preset"), [*ON_A_NORM, ("gpt2", "houlsby"), ("t5", "houlsby"), ("vit", "lin")]
)
def test_it_trains_and_the_audit_passes(name, preset):
    model = ARCHITECTURES[name].build()
    skip = {"skip_layers": 1} if preset == "drop" else {}
    adapter = weft.attach(model, weft.Bottleneck(preset=preset, r=4, **skip))
    given = ARCHITECTURES[name].inputs()
    before, optimiser, losses = (
        weft.snapshot(model),
        torch.optim.AdamW(adapter.parameters(), lr=3e-3),
        [],
    )
    for _ in range(5):
        optimiser.zero_grad()
        logits = output(model, given).flatten(0, -2)
        loss = torch.nn.functional.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    weft.audit(model, before, weft.snapshot(model))
    assert losses[-1] < losses[0]


def test_a_fused_kernel_of_torch_does_not_pass_the_adapter_by():
    """nn.TransformerEncoderLayer in eval mode reads the norm's weight instead of calling it."""
    layer = nn.TransformerEncoderLayer(24, 3, 44, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(2, 5, 24)
    adapter = weft.attach(model, weft.Bottleneck(preset="pfeiffer", r=3))
    assert list(adapter.sites) == ["layers.0.norm2", "layers.1.norm2"]
    move(adapter)
    with torch.no_grad():
        found = model(x)
    check_close(found, model.train(False)(x.requires_grad_()), torch.float32)
    with weft.use(model, None):
        assert distance(found, model(x)) > 1e-2


# Configuration


@EACH
def test_a_preset_is_defaults_of_visible_fields_and_nothing_else(preset):
    made = weft.Bottleneck(preset=preset)
    shown = {f.name: getattr(made, f.name) for f in dataclasses.fields(made)}
    assert {k: shown[k] for k in PRESETS[preset]} == PRESETS[preset]
    assert (
        weft.Bottleneck(**shown) == made
        and methods.from_json(json.loads(json.dumps(methods.to_json(made)))) == made
    )
    other = {
        "targets": "attention-output",
        "place": "parallel",
        "nonlinearity": "gelu",
        "bias": False,
        "layer_norm": True,
        "scale": 2.5,
        "skip_layers": 2,
    }
    given = dataclasses.asdict(weft.Bottleneck(preset=preset, **other))
    assert {k: given[k] for k in other} == other
    plain = {
        k: v
        for k, v in dataclasses.asdict(weft.Bottleneck(preset="lin", **other)).items()
        if k != "preset"
    }
    assert plain == {k: v for k, v in given.items() if k != "preset"}, (
        "with all fields given a preset decides nothing"
    )


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        (
            "preset",
            "housby",
            r"preset must be one of \['houlsby', 'lin', 'pfeiffer', 'drop', 'series', 'parallel'\]",
        ),
        ("place", "after", r"place must be one of \['series', 'parallel'\]"),
        (
            "nonlinearity",
            "step",
            r"nonlinearity must be one of \['relu', 'gelu', 'swish', 'tanh'\]",
        ),
        ("bias", 1, "bias must be True or False"),
        ("layer_norm", "yes", "layer_norm must be True or False"),
        ("scale", 0, r"scale must be a number in \(0.0, inf\)"),
        ("scale", float("nan"), "scale must be"),
        ("skip_layers", -1, "skip_layers must be a whole number, 0 or more"),
        ("skip_layers", True, "skip_layers must be a whole number"),
        ("skip_layers", 1.5, "whole number"),
    ],
)
def test_values_that_cannot_be_meant(field, value, says):
    with pytest.raises(weft.ConfigError, match=rf"Bottleneck\({field}=.*{says}"):
        weft.Bottleneck(**{field: value})


@pytest.mark.parametrize("field", ["preset", "skip_layers"])
def test_what_belongs_to_the_whole_model_is_no_override_of_a_layer(field):
    value = {"preset": "lin", "skip_layers": 1}[field]
    with pytest.raises(
        weft.ConfigError, match=f"Bottleneck has no field '{field}' to override per layer"
    ):
        weft.attach(net(), weft.Bottleneck(targets={"layer": {field: value}}))
    targets = {"layer": {"nonlinearity": "tanh", "place": "parallel"}, "mid": {}}
    adapter = weft.attach(net(), weft.Bottleneck(r=3, targets=targets))
    assert adapter.sites["layer"].down.shape == (3, 7) and adapter.sites["mid"].down.shape == (3, 9)


def test_ids_have_no_layer_norm_and_a_refusal_leaves_the_model():
    model = net("embedding")
    with pytest.raises(weft.TargetError, match="an embedding reads ids, which no LayerNorm takes"):
        weft.attach(model, config("Bottleneck", preset="parallel", layer_norm=True))
    assert not weft.adapters(model) and type(model.layer) is nn.Embedding
    weft.attach(model, config("Bottleneck", preset="lin"))  # in series it reads the vector


def test_dropout_acts_behind_the_nonlinearity():
    model = net()
    adapter = weft.attach(
        model, config("Bottleneck", dropout=0.5, scale=1.0, targets=["layer"], bias=False)
    )
    move(adapter)
    site, x = adapter.sites["layer"], inputs("linear", rows=1)[0, 0]
    model.train()
    with torch.no_grad(), weft.use(model, None):
        y = model.layer(x)
    z = torch.nn.functional.silu(y @ site.down.t())
    possible = [
        y + (z * 2 * torch.tensor([a, b, c])) @ site.up.t()
        for a in (0, 1)
        for b in (0, 1)
        for c in (0, 1)
    ]
    seen = set()
    for _ in range(60):
        found = model.layer(x)
        hits = [i for i, one in enumerate(possible) if distance(found, one) < 1e-5]
        assert len(hits) == 1
        seen.add(hits[0])
    assert len(seen) > 4


@given(
    st.sampled_from(list(PRESETS)),
    st.sampled_from(list("abc")),
    st.integers(1, 30),
    st.floats(0.1, 9),
)
def test_starting_values_follow_from_seed_and_name(preset, name, r, scale):
    one, two = (
        weft.attach(
            nn.ModuleDict({name: nn.Linear(9, 6)}),
            weft.Bottleneck(preset=preset, r=r, scale=scale, seed=4, targets=[name], skip_layers=0),
        ).sites[name]
        for _ in range(2)
    )
    width = 9 if preset == "parallel" else 6
    for tensor, p in one.trainable().items():
        assert same_bits(p, two.trainable()[tensor])
        if tensor == "down":
            assert 0 < float(p.detach().abs().max()) <= width**-0.5
        else:
            assert (p == (1 if tensor == "gain" else 0)).all()
    blocks = Structure.of(nn.ModuleDict({name: nn.Linear(9, 6)})).blocks
    assert blocks == []
