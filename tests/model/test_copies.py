"""Copies are independent, casts keep what must be kept, and detach leaves nothing behind."""

import copy
import io

import pytest
import torch
from torch import nn

import weft
from support import (
    KINDS,
    MERGEABLE,
    PROMPT_VARIANTS,
    RULE_VARIANTS,
    VARIANTS,
    awake,
    check_close,
    config,
    distance,
    inputs,
    move,
    net,
    oracle_output,
    same_bits,
)


def picture(model):
    """All that a user can see of a model: classes, keys, bits, flags, hooks, instance
    attributes.
    """
    return {
        "classes": [(n, type(m)) for n, m in model.named_modules()],
        "keys": list(model.state_dict()),
        "flags": [(n, p.requires_grad, id(p)) for n, p in model.named_parameters()],
        "attributes": [(n, sorted(m.__dict__)) for n, m in model.named_modules()],
        "hooks": [
            (n, len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()
        ],
        "text": repr(model),
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_detach_leaves_the_model_as_it_was(variant, kind):
    model, x = net(kind, variant=variant), inputs(kind)
    model.mid.weight.requires_grad_(False)  # the user's own choice
    before, output, base = (
        picture(model),
        model(x),
        {k: v.clone() for k, v in model.state_dict().items()},
    )
    a = awake(variant, kind, model=model)
    b = awake("DoRA", kind, model=model, name="b")
    weft.use(model, ["b", None, None, "b"])
    a.adapter.model(x)
    weft.detach(model, "default")
    assert list(weft.adapters(model)) == ["b"]
    with weft.use(model, "b"):
        check_close(model(x), oracle_output(b, b.declared()), torch.float32)
    weft.detach(model, "b")
    assert picture(model) == before
    assert all(same_bits(v, base[k]) for k, v in model.state_dict().items())
    assert same_bits(model(x), output)
    assert weft.adapters(model) == {}
    with pytest.raises(weft.WeftError, match="carries no adapter"):
        weft.detach(model)


@pytest.mark.parametrize("variant", VARIANTS)
def test_attaching_renames_replaces_and_trains_nothing_of_the_base(variant):
    model = net(variant=variant)
    modules = [(n, id(m)) for n, m in model.named_modules()]
    names = [n for n, _ in model.named_parameters()]
    a = awake(variant, model=model)
    assert [(n, i) for n, i in modules if id(model.get_submodule(n)) != i] == []
    assert [n for n, _ in model.named_parameters() if ".weft." not in n] == names
    assert isinstance(model.layer, nn.Linear) and isinstance(model.mid, nn.Linear)
    trained = set(a.adapter.selected)
    assert {
        n for n, p in model.named_parameters() if p.requires_grad and ".weft." not in n
    } == trained
    state = {k: v for k, v in model.state_dict().items() if ".weft." not in k}
    net(variant=variant).load_state_dict(state)  # every key of the base, and no other


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_is_independent(variant, kind, how):
    a = awake(variant, kind)
    output = a.run()
    if how == "deepcopy":
        other = copy.deepcopy(a.model)
    else:
        buffer = io.BytesIO()
        torch.save(a.model, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    assert (
        same_bits(other(a.x), output) and type(other.layer).__name__ == type(a.model.layer).__name__
    )
    theirs = weft.adapters(other)["default"]
    assert theirs.model is other and theirs is not a.adapter
    mine = {id(t) for t in (*a.adapter.parameters(), *a.model.parameters(), *a.model.buffers())}
    assert mine.isdisjoint(
        id(t) for t in (*theirs.parameters(), *other.parameters(), *other.buffers())
    )
    move(theirs, seed=8)
    assert same_bits(a.run(), output) and distance(other(a.x), output) > 1e-2
    with weft.use(other, None):
        assert same_bits(a.run(), output), "the copy's switch must be its own"
    if variant in MERGEABLE:
        weft.merge(other, verify=a.x)
        weft.unmerge(other)
    weft.detach(other)
    assert same_bits(a.run(), output)


def test_a_copy_made_while_rows_are_active_works_on():
    a = awake("LoRA")
    with weft.use(a.model, ["default", None, None, "default"]):
        rows, other = a.run(), copy.deepcopy(a.model)
        assert same_bits(other(a.x), rows)
    with weft.use(other, None):
        other(a.x[:1])
    with pytest.raises(weft.WeftError, match="given 4 names"):
        other(a.x[:1])
    weft.use(other, "default")
    check_close(other(a.x[:1]), a.model(a.x[:1]), torch.float32)


def test_one_layer_can_be_copied_alone():
    a = awake("DVoRA")
    other = copy.deepcopy(a.model.layer)
    wanted = a.model.layer(a.x)
    with torch.no_grad():
        a.adapter.sites["layer"].b.zero_()
    assert same_bits(other(a.x), wanted)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_cast_of_the_model_casts_whatever_is_installed_next(variant):
    """`model.to` reaches only the tensors in the model; what is put in their place later must
    follow.
    """
    for active in (None, "default"):
        a = awake(variant)
        with torch.no_grad():
            wanted = oracle_output(a, a.declared())
        weft.use(a.model, active)
        a.model.to(torch.bfloat16)
        x = a.x.to(torch.bfloat16)
        for which in (None, "default", None, "default"):
            with weft.use(a.model, which):
                found = a.model(x)
                assert found.dtype == torch.bfloat16
        check_close(found, wanted, torch.bfloat16)


@pytest.mark.parametrize("variant", [*RULE_VARIANTS, *PROMPT_VARIANTS])
def test_the_global_generator_is_left_alone_and_does_not_matter(variant):
    models = [net(variant=variant) for _ in range(3)]
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first = weft.attach(models[0], config(variant))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    torch.rand(7)
    torch.set_default_dtype(torch.bfloat16)  # as from_pretrained does for a while
    with torch.device("meta"):
        weft.attach(models[1], config("VeRA", seed=3, r=5), name="earlier")
        second = weft.attach(models[1], config(variant), name="later")
    other = weft.attach(models[2], config(variant, seed=8))
    tensors, again, theirs = (
        {**dict(a.named_parameters()), **_shared(a)} for a in (first, second, other)
    )
    assert all(same_bits(tensors[k], again[k]) for k in tensors)
    drawn = any(t.numel() and t.min() != t.max() for t in tensors.values()) and not getattr(
        first.config, "starts_at_weight", False
    )  # not all start at a constant
    differ = any(not torch.equal(tensors[k], theirs[k]) for k in tensors)
    assert differ == drawn, "another seed must give another adapter"


def _shared(adapter):
    """Frozen tensors, those that layers share among them."""
    return {f"{m}.{k}": b for m, s in adapter.sites.items() for k, b in s.named_buffers()}


def test_an_adapters_text_is_one_short_line():
    model = net()
    assert (
        repr(weft.attach(model, weft.DVoRA(r=4, targets=["layer", "mid"])))
        == "<weft.Adapter 'default': DVoRA, 2 layers, 48 trained numbers>"
    )
    assert (
        repr(weft.attach(model, weft.BitFit(), name="b"))
        == "<weft.Adapter 'b': BitFit, 2 base tensors, 20 trained numbers>"
    )
    assert (
        repr(
            weft.attach(
                model, weft.LoRA(r=1, targets=["layer"], modules_to_save=["head"]), name="c"
            )
        )
        == "<weft.Adapter 'c': LoRA, 1 layer, 2 base tensors, 68 trained numbers>"
    )
