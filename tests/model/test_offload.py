"""accelerate's device hooks: an adapter on an offloaded model gives the same numbers as without them,
whichever came first, or is refused by name.
"""

import gc
import weakref

import accelerate
import pytest
import torch
from torch import nn

import weft
from support import (
    PROMPTS,
    RULE_VARIANTS,
    SELECTIONS,
    VARIANTS,
    awake,
    config,
    distance,
    inputs,
    move,
    net,
    same_bits,
)


def cpu_offload(model, folder):
    return accelerate.cpu_offload(model, execution_device="cpu")


def disk_offload(model, folder):
    return accelerate.disk_offload(model, str(folder), execution_device="cpu")


def device_map(model, folder):
    places = {"layer": "cpu", "mid": "disk", "head": "cpu"}
    places |= {"body": "cpu"} if "body" in model._modules else {}
    return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(folder))


def hooks_alone(model, folder):
    return accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)


OFFLOADS = [cpu_offload, disk_offload, device_map]


@pytest.mark.parametrize("first", ["adapter", "hooks"])
@pytest.mark.parametrize("how", [*OFFLOADS, hooks_alone])
@pytest.mark.parametrize("variant", RULE_VARIANTS)
def test_the_same_numbers_as_without_hooks(variant, how, first, tmp_path):
    wanted = awake(variant)
    with weft.use(wanted.model, None):
        base = wanted.model(wanted.x)
    model = net(variant=variant)
    if first == "hooks":
        model = how(model, tmp_path)
    adapter = weft.attach(model, config(variant))
    if first == "hooks":
        assert distance(model(wanted.x), base) < 1e-6
    move(adapter)
    if first == "adapter":
        model = how(model, tmp_path)
    for _ in range(2):
        assert distance(model(wanted.x), wanted.run()) < 1e-6
    with weft.use(model, None):
        assert distance(model(wanted.x), base) < 1e-6
    with weft.use(model, ["default", None] * 2):
        rows = model(wanted.x)
    assert distance(rows[1::2], base[1::2]) < 1e-6
    assert distance(rows[::2], wanted.run()[::2]) < 1e-5
    weft.detach(model)
    assert distance(model(wanted.x), base) < 1e-6
    assert not any("weft" in key for key in vars(model.layer))


@pytest.mark.parametrize(
    "variant", [v for v in VARIANTS if v.partition(":")[0] in (*PROMPTS, *SELECTIONS)]
)
def test_what_reads_or_trains_the_base_between_forwards_is_refused(variant, tmp_path):
    model = cpu_offload(net(variant=variant), tmp_path)
    with pytest.raises(weft.TargetError, match="is offloaded by accelerate"):
        weft.attach(model, config(variant))
    assert torch.isfinite(model(inputs("linear"))).all()
    model = hooks_alone(net(variant=variant), tmp_path)
    weft.attach(model, config(variant))
    if variant in SELECTIONS:
        model = cpu_offload(awake(variant).model, tmp_path)
        with pytest.raises(weft.WeftError, match="has been offloaded by accelerate since attach"):
            model(inputs("linear"))


def test_weights_that_a_parent_loads_are_refused_by_name():
    model = accelerate.cpu_offload(
        nn.Sequential(nn.Sequential(nn.Linear(7, 7)), nn.Linear(7, 7)),
        execution_device="cpu",
        preload_module_classes=["Sequential"],
    )
    with pytest.raises(weft.TargetError, match=r"'0\.0' is offloaded by accelerate together with"):
        weft.attach(model, weft.LoRA(r=2))


@pytest.mark.parametrize("how", OFFLOADS)
def test_an_adapter_loads_onto_an_offloaded_model_and_is_saved_from_it(how, tmp_path):
    for method in ("LoRA", "DoRA", "VeRA"):
        a = awake(method)
        weft.save(a.model, tmp_path / method)
        model = how(net(), tmp_path / "weights")
        weft.load(model, tmp_path / method)
        assert distance(model(a.x), a.run()) < 1e-6
        weft.save(model, tmp_path / "again")
        weft.load(net(), tmp_path / "again")
        with pytest.raises(weft.CheckpointError, match="the base has other weights"):
            weft.load(net(seed=1), tmp_path / "again")
        with pytest.raises(weft.CheckpointError, match="the base has other weights"):
            weft.load(how(net(seed=1), tmp_path / "other"), tmp_path / method)
        with pytest.raises(weft.MergeError, match="has no weight between forwards"):
            weft.merge(model)


@pytest.mark.parametrize("first", ["adapter", "hooks"])
def test_an_adapter_trains_on_an_offloaded_model(first, tmp_path):
    a, model = awake("DoRA"), net()
    if first == "hooks":
        model = cpu_offload(model, tmp_path)
    adapter = weft.attach(model, config("DoRA"))
    move(adapter)
    if first == "adapter":
        model = cpu_offload(model, tmp_path)
    model(a.x).pow(2).sum().backward()
    a.run().pow(2).sum().backward()
    for (name, mine), theirs in zip(
        adapter.named_parameters(), a.adapter.parameters(), strict=True
    ):
        assert distance(mine.grad, theirs.grad) < 1e-5, name


def test_offloaded_weights_are_not_kept_after_a_forward(tmp_path):
    model = cpu_offload(net(), tmp_path)
    move(weft.attach(model, config("DoRA")))
    seen = []
    handle = model.mid.register_forward_hook(lambda *_: None)
    inner = model.mid._old_forward

    def look(x):
        seen.append(weakref.ref(model.mid.weight))
        return inner(x)

    model.mid._old_forward = look
    with torch.no_grad():
        model(inputs("linear"))
    handle.remove()
    gc.collect()
    assert seen[0]() is None


def test_the_effective_weight_of_an_offloaded_layer(tmp_path):
    a, model = awake("DoRA"), cpu_offload(net(), tmp_path)
    move(weft.attach(model, config("DoRA")))
    assert same_bits(weft.effective_weight(model.mid), weft.effective_weight(a.model.mid))


@pytest.mark.parametrize("offload", [cpu_offload, disk_offload, device_map])
@pytest.mark.parametrize("variant", ["LoRA", "DoRA"])
def test_sums_and_starts_of_offloaded_layers(variant, offload, tmp_path):
    answers = []
    for away in (False, True):
        model = net()
        model = offload(model, tmp_path) if away else model
        for i, name in enumerate("ab"):
            fields = {"init": "pissa", "r": 2 + i, "seed": i}
            move(weft.attach(model, config(variant, **fields), name=name), i)
        x, strengths = inputs("linear"), {"a": 0.5, "b": -0.4}
        with torch.no_grad(), weft.use(model, strengths):
            answers.append(model(x))
        both = weft.combine(model, strengths, name="both")
        with torch.no_grad():
            assert both.is_attached and distance(model(x), answers[0]) < 1e-5
    assert distance(*answers) < 1e-6
