"""Twenty-six multimodal and encoder-decoder architectures, each with the methods that fit it: attach,
train, audit, save, load, merge.
"""

from __future__ import annotations

import re

import pytest
import torch

import weft

pytest.importorskip("transformers")

from animals import ZOO, answer

from support import move
from weft.inference.dummy_inputs import dummy_inputs

CONFIGS = {
    "LoRA": weft.LoRA(r=3, alpha=5, targets="all-linear"),
    "DoRA": weft.DoRA(r=3, alpha=5, targets="all-linear"),
    "VeRA": weft.VeRA(r=4, d_init=0.3, targets="all-linear"),
    "DVoRA": weft.DVoRA(r=4, d_init=0.3, targets="all-linear"),
    "BitFit": weft.BitFit(),
    "Prefix": weft.Prefix(n=2),
    "PreEmbed": weft.PreEmbed(l_p=2, l_i=1),
    "PreLayer": weft.PreLayer(l_p=2),
}
PROMPTS = ("Prefix", "PreEmbed", "PreLayer")
OFTEN = ("DoRA", "BitFit", *PROMPTS)  # the others: always for two models, else by `make slow`


def fits(name: str, method: str) -> bool:
    animal = ZOO[name]
    refused = {"Prefix": animal.prefix, "PreEmbed": animal.virtual, "PreLayer": animal.virtual}
    return not refused.get(method) and (method != "BitFit" or animal.biases)


PAIRS = [
    pytest.param(
        name,
        method,
        marks=[] if method in OFTEN or name in ("llava", "whisper") else pytest.mark.slow,
    )
    for name in ZOO
    for method in CONFIGS
    if fits(name, method)
]
REFUSED = [(n, m) for n in ZOO for m in PROMPTS if not fits(n, m)]
pytestmark = pytest.mark.filterwarnings("ignore:No output depends on")


def trained(model, adapter, given, steps=2):
    """What the audit names after so many steps, with all that gradients never reach allowed."""
    optimizer = torch.optim.AdamW(adapter.parameters(), 1e-2)
    before = weft.snapshot(model)
    for _ in range(steps):
        answer(model, given).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return weft.audit(model, before, weft.snapshot(model), unreached="allow")


@pytest.mark.parametrize(("name", "method"), PAIRS)
def test_it_trains_all_that_it_declares_and_travels(name, method, tmp_path):
    animal = ZOO[name]
    # Some models give other bits if their weights have gradients.
    model, given = animal.build().requires_grad_(False), animal.inputs(2)
    with torch.no_grad():
        base = answer(model, given)
    adapter = weft.attach(model, CONFIGS[method])
    with torch.no_grad():
        assert torch.equal(answer(model, given), base) == (method not in PROMPTS)
    named = trained(model, adapter, given)
    assert all(any(part in n for part in animal.untouched) for n in named), named
    weft.save(model, tmp_path)
    again = animal.build()
    weft.load(again, tmp_path)
    with torch.no_grad():
        wanted = answer(model, given)
        assert torch.equal(answer(again, given), wanted)
        assert (wanted - base).abs().max() > 1e-3
    if CONFIGS[method].mergeable:
        move(adapter)
        report = weft.merge(model, verify=dummy_inputs(model, [5, 6]))
        assert report.effect > 1e-3


@pytest.mark.parametrize(("name", "method"), REFUSED)
def test_a_prompt_that_does_not_fit_is_refused_at_attach(name, method):
    animal = ZOO[name]
    model = animal.build()
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    reason = animal.prefix if method == "Prefix" else animal.virtual
    with pytest.raises(weft.TargetError, match=re.escape(reason)):
        weft.attach(model, CONFIGS[method])
    assert not weft.adapters(model)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before


def test_kosmos_takes_a_prefix_that_leaves_positions_alone():
    animal = ZOO["kosmos2"]
    model, given = animal.build(), animal.inputs(2)
    adapter = weft.attach(model, weft.Prefix(n=2, positions="kept"))
    assert list(adapter.layers) == [f"text_model.model.layers.{i}.self_attn" for i in (0, 1)]
    assert trained(model, adapter, given) == []


def test_florence_has_its_prefix_in_the_language_model_and_the_plan_names_the_tower():
    adapter = weft.attach(ZOO["florence2"].build(), weft.Prefix(n=2))
    assert all(name.startswith("model.language_model.") for name in adapter.layers)
    assert len(adapter.layers) == 4
    assert "outside of 'model.language_model'" in " ".join(str(adapter.plan()).split())


UNREAD = [name for name, animal in ZOO.items() if animal.unread]


@pytest.mark.parametrize("name", UNREAD)
def test_what_no_output_depends_on_is_left_out_by_name(name):
    animal = ZOO[name]
    model = animal.build()
    with pytest.warns(UserWarning, match=r"No output depends on .*nothing there is trained"):
        adapter = weft.attach(
            model, weft.LoRA(r=2, targets="all-linear", train=["biases", "norms"])
        )
    kept = [*adapter.sites, *adapter.selected]
    for part in animal.unread:
        assert not any(f".{part}." in f".{n}" for n in kept)
        assert any(f".{part}." in f".{f.name}" for f in adapter.frozen)
    assert adapter.notes
    before = weft.snapshot(model)
    optimizer = torch.optim.AdamW(adapter.parameters(), 1e-2)
    for _ in range(2):
        answer(model, animal.inputs(2)).pow(2).mean().backward()
        optimizer.step()
    assert weft.audit(model, before, weft.snapshot(model)) == []


def test_a_name_of_nothing_but_unread_layers_is_an_error():
    model = ZOO["llava"].build()
    with pytest.raises(weft.TargetError, match=r"changes no output: it is behind the last state"):
        weft.attach(model, weft.LoRA(targets=["layers.2.self_attn.q_proj"]))
    adapter = weft.attach(model, weft.LoRA(r=2, targets=["q_proj"], within="vision_tower"))
    assert [n.split(".")[4] for n in adapter.sites] == ["0", "1"]


@pytest.mark.parametrize("layer", [[-2, 1], 0, -1, 2])
def test_the_blocks_that_are_read_follow_the_configuration(layer):
    config = ZOO["llava"].config()
    config.vision_feature_layer = layer
    import transformers

    model = transformers.LlavaForConditionalGeneration(config)
    last = max(i if i >= 0 else 4 + i for i in ([layer] if isinstance(layer, int) else layer))
    if last:
        adapter = weft.attach(model, weft.LoRA(r=2, targets=["fc1"]))
        assert len(adapter.sites) == last
    else:
        with pytest.raises(weft.TargetError, match="changes no output"):
            weft.attach(model, weft.LoRA(r=2, targets=["fc1"]))


@pytest.mark.parametrize(
    "name",
    ["BertForPreTraining", "BertForSequenceClassification", "LayoutLMForTokenClassification"],
)
def test_a_pooler_is_left_out_only_if_no_class_around_it_reads_it(name):
    import transformers

    cls = getattr(transformers, name)
    with torch.device("meta"):
        model = cls(cls.config_class(num_hidden_layers=1))
    adapter = weft.attach(model, weft.LoRA(r=2, targets="all-linear"))
    there = any("pooler" in site for site in adapter.sites)
    assert there == (name != "LayoutLMForTokenClassification")


def test_a_model_that_hands_its_pooled_vector_to_the_caller_keeps_it():
    import transformers

    with torch.device("meta"):
        model = transformers.ViTModel(transformers.ViTConfig(num_hidden_layers=1))
    adapter = weft.attach(model, weft.LoRA(r=2, targets="all-linear"))
    assert "pooler.dense" in adapter.sites
