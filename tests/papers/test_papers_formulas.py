"""The closed form of every method equals what the method really attaches, over random shapes."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import weft
from weft.methods import METHODS
from weft.papers.architectures import gpt2, vit
from weft.papers.formulas import FORMS, Sizes
from weft.papers.tables import tables

PRESETS = ("houlsby", "lin", "pfeiffer", "drop", "series", "parallel")
RANKED = ("LoRA", "DyLoRA", "AdaLoRA", "LoRAFA", "VeRA", "DoRA", "DVoRA")
few = st.integers(1, 9)


def ranked(name, r, targets):
    return METHODS[name](r=r, targets=targets, **({"target_r": r} if name == "AdaLoRA" else {}))


def test_every_method_of_the_papers_has_a_closed_form():
    # The number of any other method is in tests/oracle.py only.
    counted = {data["method"] for table in tables() for row in table.rows for data in row.methods}
    assert counted <= set(FORMS) <= set(METHODS)


@pytest.mark.parametrize("name", RANKED)
@given(st.lists(st.tuples(few, few), min_size=1, max_size=4), few)
def test_a_rule_trains_what_its_closed_form_says_on_maps_of_any_shape(name, shapes, r):
    with torch.device("meta"):
        model = nn.ModuleDict(
            {f"map{i}": nn.Linear(in_, out) for i, (out, in_) in enumerate(shapes)}
        )
    config = ranked(name, r, list(model))
    adapter = weft.attach(model, config)
    assert adapter.num_parameters == FORMS[name].count(config, Sizes(maps=tuple(shapes)))


@st.composite
def sizes_of_gpt2(draw):
    heads = draw(st.integers(1, 3))
    return Sizes(
        layers=draw(st.integers(1, 3)),
        width=heads * 2 * draw(st.integers(1, 4)),
        inner=draw(st.integers(1, 40)),
        vocabulary=draw(st.integers(1, 50)),
        positions=draw(st.integers(1, 20)),
        classes=heads,
    )


def small_gpt2(s):
    """`classes` is not used by any form of a GPT-2 and holds its number of heads."""
    with torch.device("meta"):
        return gpt2(
            s.width, s.layers, s.positions, vocabulary=s.vocabulary, heads=s.classes, inner=s.inner
        )


@pytest.mark.parametrize("name", RANKED)
@given(
    s=sizes_of_gpt2(),
    r=few,
    ends=st.sets(
        st.sampled_from(["q_proj", "v_proj", "attn.c_proj", "c_fc", "mlp.c_proj"]), min_size=1
    ),
)
def test_a_rule_trains_what_its_closed_form_says_on_a_gpt2(name, s, r, ends):
    config = ranked(name, r, sorted(ends))
    shapes = {"c_fc": (s.inner, s.width), "mlp.c_proj": (s.width, s.inner)}
    maps = tuple(shapes.get(end, (s.width, s.width)) for end in ends) * s.layers
    assert weft.attach(small_gpt2(s), config).num_parameters == FORMS[name].count(
        config, Sizes(maps=maps)
    )


def transformer_configs(name, s, data):
    """A configuration of a method that reads the whole transformer."""
    fields = {
        "Full": {},
        "BitFit": {},
        "TopLayers": {"k": st.integers(1, s.layers)},
        "Prefix": {"n": few},
        "PreEmbed": {"l_p": few, "l_i": few},
        "PreLayer": {"l_p": few, "l_i": few},
    }[name]
    return METHODS[name](
        **{field: data.draw(values, label=field) for field, values in fields.items()}
    )


@pytest.mark.parametrize("name", ["Full", "BitFit", "TopLayers", "Prefix", "PreEmbed", "PreLayer"])
@given(s=sizes_of_gpt2(), data=st.data())
def test_a_method_of_the_whole_transformer_trains_what_its_closed_form_says(name, s, data):
    config = transformer_configs(name, s, data)
    assert weft.attach(small_gpt2(s), config).num_parameters == FORMS[name].count(config, s)


@pytest.mark.parametrize("preset", PRESETS)
@given(s=sizes_of_gpt2(), r=few, data=st.data())
def test_an_adapter_trains_what_its_closed_form_says(preset, s, r, data):
    skipped = {"skip_layers": data.draw(st.integers(0, s.layers - 1))} if preset == "drop" else {}
    config = METHODS["Bottleneck"](preset=preset, r=r, **skipped)
    assert weft.attach(small_gpt2(s), config).num_parameters == FORMS["Bottleneck"].count(config, s)


@given(few, few)
def test_the_head_trains_what_its_closed_form_says(eighth, classes):
    with torch.device("meta"):
        model = vit(64 * eighth, 1, classes)
    s = Sizes(width=64 * eighth, classes=classes)
    assert weft.attach(model, weft.Head()).num_parameters == FORMS["Head"].count(weft.Head(), s)


MODELS = {
    "GPT-2 medium": Sizes((), 24, 1024, 4096, 50257, 1024),
    "GPT-2 large": Sizes((), 36, 1280, 5120, 50257, 1024),
    "GPT-3 175B": Sizes((), 96, 12288, 4 * 12288, 2 * 50257, 2048),
    "RoBERTa-base": Sizes((), 12, 768, 3072),
    "RoBERTa-large": Sizes((), 24, 1024, 4096),
    "ViT-B/16": Sizes((), 12, 768, 3072),
    "ViT-L/16": Sizes((), 24, 1024, 4096),
    "LLaMA-7B": Sizes((), 32, 4096, 11008),
    "LLaMA-13B": Sizes((), 40, 5120, 13824),
    "LLaMA2-7B": Sizes((), 32, 4096, 11008),
}


def maps_of(s, targets, llama):
    """The adapted maps of a block by its sizes; the MLP's way up is f x d, its way down d x f."""
    d, f = s.width, s.inner
    if isinstance(targets, list):
        ends = targets
    elif targets == "all-linear":
        ends = ["q", "k", "v", "o", "up", "down", *(["gate"] if llama else [])]
    else:
        ends = ["q", "v"]
    shapes = {"up": (f, d), "gate": (f, d), "down": (d, f)}
    return tuple(shapes.get(end.removesuffix("_proj"), (d, d)) for end in ends) * s.layers


@pytest.mark.shared
def test_the_closed_forms_give_the_numbers_that_the_facts_have(shared):
    """This holds table, form and facts together without attaching."""
    facts = {
        row["id"]: row
        for row in json.loads((shared / "facts" / "param_counts.json").read_text(encoding="utf-8"))
    }
    held = set()
    for row in (row for table in tables() for row in table.rows):
        name = row.methods[0]["method"] if len(row.methods) == 1 else None
        whole = name in ("Full", "BitFit", "Head")
        if (
            row.model not in MODELS
            or row.printed == "-"
            or (whole and not row.model.startswith("GPT"))
        ):
            continue
        s = MODELS[row.model]
        llama = row.model.startswith("LLaMA")
        sizes = dataclasses.replace(s, maps=maps_of(s, row.methods[0].get("targets"), llama))
        found = FORMS[name].count(SimpleNamespace(**row.methods[0]), sizes) * (
            4 if row.unit == "bytes" else 1
        )
        fact = facts[row.id]
        assert found == (fact["computed_trainable_params"] or fact["computed"]), (row.id, row.row)
        held.add(name)
    assert held == set(FORMS) - {"Head"}
