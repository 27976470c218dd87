"""Attaching does all or nothing, freezes the base, and refuses what would go wrong later."""

import pytest
import torch
from torch import nn

import weft
from support import VARIANTS, awake, config, inputs, move, net, same_bits
from weft.model import attach as attaching


def flags(model):
    return [(n, p.requires_grad) for n, p in model.named_parameters()]


@pytest.mark.parametrize(
    "build",
    [
        lambda m: weft.attach(m, weft.LoRA(targets=["nothing"])),
        lambda m: weft.attach(m, weft.LoRA(targets={"layer": {"r": 3}, "nothing": {}})),
        lambda m: weft.attach(m, config("LoRA", modules_to_save=["nothing"])),
        lambda m: weft.attach(m, config("LoRA", modules_to_save=["layer"])),
        lambda m: weft.attach(m, config("VeRA", draw="stored")),
        lambda m: weft.attach(m, weft.LoRA(targets={"layer": {"rank": 3}})),
        lambda m: weft.attach(m, "lora"),
        lambda m: weft.attach(m, weft.LoRA),
        lambda m: weft.attach(m, config("LoRA"), name="a.b"),
        lambda m: weft.attach(m, config("LoRA"), name=""),
        lambda m: weft.attach(m, config("LoRA"), name=5),
        lambda m: weft.attach(m, config("LoRA"), name="keys"),
    ],
)
def test_a_failed_attach_leaves_the_model_untouched(build):
    model, x = net(), inputs("linear")
    before, seen, classes = model(x), flags(model), [type(m) for m in model.modules()]
    with pytest.raises(weft.WeftError):
        build(model)
    assert (
        same_bits(model(x), before)
        and flags(model) == seen
        and [type(m) for m in model.modules()] == classes
    )
    assert "_weft" not in str(sorted(model.__dict__)) and not weft.adapters(model)


def test_a_failure_in_the_middle_of_building_leaves_the_model_and_what_is_active(monkeypatch):
    a = awake("LoRA")
    weft.attach(a.model, config("Head"), name="head")
    seen, output = flags(a.model), a.run()
    calls = []

    def fail(self, rng, filled):
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError("no room for the second layer")

    monkeypatch.setattr(attaching.AdapterLayer, "initialise", fail)
    with pytest.raises(MemoryError):
        weft.attach(a.model, config("DoRA"), name="b")
    assert flags(a.model) == seen and list(weft.adapters(a.model)) == ["default", "head"]
    assert same_bits(a.run(), output)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_base_is_frozen_and_the_adapter_is_not(variant):
    a = awake(variant)
    ours = {id(p) for p in a.adapter.parameters()}
    assert all(p.requires_grad == (id(p) in ours) for p in a.model.parameters())
    assert all(p.is_leaf for p in a.adapter.parameters())


def test_names_that_are_taken_say_so():
    a = awake("LoRA")
    with pytest.raises(
        weft.WeftError, match=r"'default' is already attached \(have: \['default'\]\)"
    ):
        weft.attach(a.model, config("DoRA"))
    with pytest.raises(weft.WeftError, match="no adapter is named 'b'"):
        weft.detach(a.model, "b")


def test_a_part_of_an_adapted_model_cannot_be_adapted_through_another_root():
    model = nn.Sequential(net(), nn.Linear(5, 4))
    weft.attach(model[0], config("LoRA"))
    with pytest.raises(
        weft.WeftError,
        match=r"'0\.layer' carries an adapter that was attached through another root",
    ):
        weft.attach(model, weft.LoRA(r=2, targets="all-linear"))
    weft.detach(model[0])
    weft.attach(model, weft.LoRA(r=2, targets="all-linear"))


def test_a_layer_with_an_attribute_of_our_name_is_refused():
    model = net()
    model.mid.weft = "mine"
    with pytest.raises(weft.TargetError, match="'mid' has an attribute 'weft' of its own"):
        weft.attach(model, config("LoRA"))
    assert type(model.layer) is nn.Linear


def test_a_module_that_sits_in_two_places_is_adapted_once():
    model = net()
    model.again = model.layer
    adapter = weft.attach(model, config("LoRA"))
    move(adapter)
    assert list(adapter.sites) == ["layer", "mid"] and model.again is model.layer
    x = inputs("linear")
    assert same_bits(model.again(x), model.layer(x))
    weft.detach(model)
    assert type(model.again) is nn.Linear


def test_a_user_who_changed_the_model_can_still_detach():
    a = awake("LoRA")
    a.model.head = nn.Linear(9, 4)
    a.model.extra = nn.Linear(2, 2)
    weft.detach(a.model)
    assert all(p.requires_grad for p in a.model.parameters()) and not weft.adapters(a.model)


def test_layers_in_training_mode_get_adapters_in_training_mode():
    model = net()
    model.eval()
    adapter = weft.attach(model, config("LoRA", dropout=0.5))
    assert not any(site.training for site in adapter.sites.values())
    model.train()
    assert all(site.training for site in adapter.sites.values())


def test_a_forward_on_the_instance_stays_inside():
    """accelerate's hooks replace the forward of the instance; ours must run it, and detach must
    give it back.
    """
    model, calls = net(), []
    plain = model.layer.forward

    def counted(x):
        calls.append(x)
        return plain(x)

    model.layer.forward = counted
    before = model.layer(inputs("linear"))
    adapter = weft.attach(model, config("LoRA"))
    calls.clear()
    assert same_bits(model.layer(inputs("linear")), before) and len(calls) == 1
    move(adapter)
    assert not torch.equal(model.layer(inputs("linear")), before)
    weft.detach(model)
    assert "forward" in model.layer.__dict__ and same_bits(model.layer(inputs("linear")), before)


def test_layers_may_be_called_with_keywords():
    a = awake("DoRA")
    assert same_bits(a.model.layer(input=a.x), a.model.layer(a.x))


def test_a_forward_that_was_kept_outlives_detach():
    """accelerate keeps the forward that it found when its hook came, and calls it for as long as
    the hook lives.
    """
    a = awake("LoRA")
    with weft.use(a.model, None):
        base = a.model.layer(a.x)
    kept = a.model.layer.forward
    a.model.layer.forward = kept
    weft.detach(a.model)
    assert same_bits(a.model.layer(a.x), base)


def test_hooks_on_an_adapted_layer_see_the_adapted_output():
    a = awake("VeRA")
    seen = []
    a.model.layer.register_forward_hook(lambda module, args, out: seen.append(out))
    wanted = a.model.layer(a.x)
    assert same_bits(seen[-1], wanted)
    with weft.use(a.model, None):
        assert not torch.equal(a.model.layer(a.x), wanted)
