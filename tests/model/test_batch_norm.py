"""`freeze_batch_norm`: the running statistics of the base stay, and the audit looks at them."""

import copy
import pickle

import pytest
import torch
from torch import nn

import weft
from support import config, same_bits
from weft.methods import METHODS
from weft.model import memory, statistics

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 9), nn.BatchNorm1d(9), nn.Tanh(), nn.Linear(9, 5))


def steps(net, adapter, n=3):
    optimiser = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    net.train()
    for _ in range(n):
        optimiser.zero_grad()
        net(torch.randn(8, 7)).pow(2).mean().backward()
        optimiser.step()


def bits(net):
    return {name: getattr(net[1], name).clone() for name in STATISTICS}


@pytest.mark.parametrize("name", ["LoRA", "DVoRA", "Bottleneck", "Full", "BitFit"])
def test_the_statistics_stay_with_every_kind_of_method(name):
    net = model()
    fields = {"targets": ["0", "3"]} if "targets" in METHODS[name].__dataclass_fields__ else {}
    adapter = weft.attach(net, config(name, **fields, freeze_batch_norm=True))
    start, before = bits(net), weft.snapshot(net)
    steps(net, adapter)
    weft.audit(net, before, weft.snapshot(net))
    assert all(same_bits(t, start[key]) for key, t in bits(net).items())
    assert net.training and net[0].training and not net[1].training


def test_training_computes_what_evaluation_does():
    net = model()
    weft.attach(net, weft.LoRA(targets=["0"], freeze_batch_norm=True))
    x = torch.randn(8, 7)
    assert same_bits(net.train()(x), net.eval()(x))


@pytest.mark.parametrize("key", STATISTICS)
def test_each_of_them_is_part_of_the_audit(key):
    net = model()
    adapter = weft.attach(net, weft.LoRA(targets=["0", "3"], freeze_batch_norm=True))
    before = weft.snapshot(net)
    steps(net, adapter)
    getattr(net[1], key).add_(1)
    with pytest.raises(
        weft.AuditError, match=rf"1\.{key}: base tensor changed .*freeze_batch_norm"
    ):
        weft.audit(net, before, weft.snapshot(net))


def test_detach_gives_back_class_and_mode():
    net = model()
    weft.attach(net, weft.LoRA(targets=["0"], freeze_batch_norm=True), name="a")
    weft.attach(net, weft.LoRA(targets=["3"], freeze_batch_norm=True), name="b")
    net.train()
    weft.detach(net, "a")
    assert not net[1].training and isinstance(net[1], nn.BatchNorm1d)
    weft.detach(net, "b")
    assert type(net[1]) is nn.BatchNorm1d and net[1].training
    assert set(net[1].__dict__) == set(nn.BatchNorm1d(9).__dict__)
    weft.attach(net, weft.LoRA(targets=["0"], freeze_batch_norm=True))
    net.eval()
    weft.detach(net)
    assert not net[1].training


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])  # noqa: S301
def test_a_copy_is_frozen_too(copied):
    net = model()
    weft.attach(net, weft.LoRA(targets=["0"], freeze_batch_norm=True))
    other = copied(net).train()
    start = bits(other)
    other(torch.randn(8, 7))
    assert all(same_bits(t, start[key]) for key, t in bits(other).items())


def test_a_loaded_adapter_keeps_the_switch_and_old_readers_are_not_told_without_it(tmp_path):
    net = model()
    adapter = weft.attach(net, weft.LoRA(targets=["0", "3"], freeze_batch_norm=True))
    steps(net, adapter)
    weft.save(net, tmp_path)
    other = model()
    loaded = weft.load(other, tmp_path)
    assert loaded.config.freeze_batch_norm and not other.train()[1].training
    assert "freeze_batch_norm" not in weft.methods.to_json(weft.LoRA())


@pytest.mark.parametrize("value", ["true", 1, None])
def test_the_switch_is_a_boolean(value):
    with pytest.raises(weft.ConfigError, match="freeze_batch_norm must be True or False"):
        weft.LoRA(freeze_batch_norm=value)


def test_a_model_without_statistics_refuses_the_switch():
    for net in (
        nn.Sequential(nn.Linear(7, 9)),
        nn.Sequential(nn.Linear(7, 9), nn.BatchNorm1d(9, track_running_stats=False)),
    ):
        with pytest.raises(weft.TargetError, match="no batch norm that keeps running statistics"):
            weft.attach(net, weft.LoRA(targets=["0"], freeze_batch_norm=True))
        assert not weft.adapters(net)


def test_replaced_and_combined_adapters_keep_it(tmp_path):
    files = {}
    for frozen in (True, False):
        net = model()
        weft.attach(net, weft.LoRA(targets=["0", "3"], freeze_batch_norm=frozen))
        weft.save(net, files.setdefault(frozen, tmp_path / str(frozen)))
    net = model()
    weft.load(net, files[True], name="a")
    for frozen in (False, True, True, False):
        weft.load(net, files[frozen], name="a", replace=True)
        assert net.train()[1].training != frozen
    weft.load(net, files[True], name="b")
    assert weft.combine(net, {"a": 0.5, "b": 0.5}, name="both").config.freeze_batch_norm
    weft.detach(net, "b")
    assert not net.train()[1].training
    weft.detach(net, "both")
    assert net.train()[1].training


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("call", ["merge", "moving", "estimate"])
def test_looking_at_a_model_leaves_every_mode_as_it_was(call, frozen):
    net = nn.Sequential(nn.Linear(7, 9), nn.BatchNorm1d(9), nn.Dropout(), nn.Linear(9, 5))
    adapter = weft.attach(net, weft.LoRA(targets=["0"], freeze_batch_norm=frozen))
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_()
    trains = call == "merge"
    net.train(trains)[2].train(not trains)
    before = {m: m.training for m in net.modules()}
    if call == "merge":
        weft.merge(net, verify=torch.randn(4, 7))
        weft.unmerge(net)
    elif call == "moving":
        assert statistics.moving(net) == ([] if frozen else ["1"])
    else:
        memory.estimate(adapter, {"input": torch.randn(4, 7)})
    assert {m: m.training for m in net.modules()} == before
    weft.detach(net)
    assert net[1].training is trains and net[2].training is not trains


@pytest.mark.parametrize("change", ["replace", "convert"])
def test_a_batch_norm_that_came_after_attach_is_named(change, tmp_path):
    net = model()
    weft.attach(net, weft.LoRA(targets=["0"], freeze_batch_norm=True))
    weft.attach(net, weft.LoRA(targets=["3"]), name="other")
    net(torch.randn(4, 7))
    if change == "replace":
        net[1] = nn.BatchNorm1d(9)
    else:
        nn.SyncBatchNorm.convert_sync_batchnorm(net)
    for error, call in (
        (weft.WeftError, lambda: net(torch.randn(4, 7))),
        (weft.MergeError, lambda: weft.merge(net)),
    ):
        with pytest.raises(error, match=r"'1' \(\w+\) keeps running statistics, and came into"):
            call()
    weft.detach(net)
    net[1] = nn.BatchNorm1d(9)
    net(torch.randn(4, 7))
