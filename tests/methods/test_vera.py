"""VeRA's frozen pair: one a model, the same from the seed alone, unharmed by casts."""

import copy
import math

import pytest
import torch
from torch import nn

import oracle
import weft
from support import awake, check_close, config, inputs, move, net, oracle_output, same_bits
from weft.methods.projections import Projections

METHODS = ("VeRA", "DVoRA")


def pairs(model):
    """Every layer's view of every adapter: (data_ptr of A, data_ptr of B)."""
    return {
        (site.shared.A.data_ptr(), site.shared.B.data_ptr())
        for adapter in weft.adapters(model).values()
        for site in adapter.sites.values()
    }


@pytest.mark.parametrize("name", METHODS)
def test_a_and_b_exist_once_a_model_frozen_and_not_in_its_state(name):
    a = awake(name)
    assert len(pairs(a.model)) == 1
    assert [n for n, _ in a.model.named_buffers()] == [
        "layer.weft.default.shared.A",
        "layer.weft.default.shared.B",
    ]
    assert not any("shared" in key for key in a.model.state_dict())
    assert not any("shared" in key for key, _ in a.model.named_parameters())


def test_equal_pairs_are_one_across_adapters_and_methods_and_others_are_not():
    model = net()
    weft.attach(model, config("VeRA"), name="a")
    weft.attach(model, config("DVoRA"), name="b")
    weft.attach(model, config("VeRA", d_init=0.7, dropout=0.1), name="c")
    assert len(pairs(model)) == 1
    weft.attach(model, config("VeRA", seed=8), name="seed")
    weft.attach(model, config("VeRA", r=5), name="rank")
    weft.attach(model, config("VeRA", draw="peft"), name="draw")
    assert len(pairs(model)) == 4
    weft.attach(
        model, config("VeRA", targets=["layer"]), name="smaller"
    )  # its widest layer differs, so its bound does
    assert len(pairs(model)) == 5
    weft.detach(model, "a")
    weft.attach(model, config("VeRA"), name="again")
    assert len(pairs(model)) == 5


def test_two_adapters_of_other_ranks_and_seeds_live_on_one_model():
    model = net()
    first = awake("VeRA", model=model, name="first", r=3, seed=1)
    second = awake("VeRA", model=model, name="second", r=17, seed=2)
    for a, name in ((first, "first"), (second, "second"), (first, "first")):
        with weft.use(model, name):
            check_close(model(a.x), oracle_output(a, a.declared()), torch.float32)


@pytest.mark.parametrize("name", METHODS)
def test_the_pair_is_drawn_by_the_counter_from_the_seed_alone(name):
    adapter = weft.attach(net(), config(name, r=4, seed=2**40 + 9))
    shared = adapter.sites["mid"].shared
    assert shared.A.shape == (4, 11) and shared.B.shape == (11, 4)
    key = ((2**40 + 9) & 0xFFFFFFFF, (2**40 + 9) >> 32)
    for stream, matrix, bound in (
        (0, shared.A, math.sqrt(6 / 11)),
        (1, shared.B, math.sqrt(6 / 4)),
    ):
        step = torch.tensor(bound * 2.0**-24, dtype=torch.float32)
        for i in range(matrix.shape[0]):
            for j in range(matrix.shape[1]):
                odd = (oracle.philox((j // 4, i, stream, 0), key)[j % 4] >> 8) * 2 + 1 - 2**24
                assert float(matrix[i, j]) == float(torch.tensor(float(odd)) * step)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("draw", ["weft", "peft"])
def test_casts_there_and_back_lose_no_bit(name, draw):
    a = awake(name, draw=draw)
    A, B = (t.clone() for t in a.adapter.sites["layer"].shared.buffers())
    for there in (torch.bfloat16, torch.float16, torch.float64):
        a.model.to(there)
        shared = a.adapter.sites["layer"].shared
        assert (
            shared.A.dtype == there
            and same_bits(shared.A, A.to(there))
            and len(pairs(a.model)) == 1
        )
        a.model.to(torch.float32)
        assert same_bits(shared.A, A) and same_bits(shared.B, B) and len(pairs(a.model)) == 1


def test_matrices_from_a_file_come_back_from_a_cast_too():
    A, B = torch.randn(3, 11), torch.randn(11, 3)
    shared = Projections(3, 11, 11, 0, "stored", stored=(A, B))
    holder = nn.ModuleList([nn.ModuleList([shared]), nn.ModuleList([shared])])
    before = shared.checksum()
    holder.to(torch.bfloat16)
    assert shared.A.dtype == torch.bfloat16 and shared.checksum() == before
    holder.to(torch.float32)
    assert same_bits(shared.A, A) and same_bits(shared.B, B)
    holder.to_empty(device="cpu")
    assert same_bits(shared.A, A) and same_bits(shared.B, B)
    with pytest.raises(weft.ConfigError, match="come from a file only"):
        weft.attach(net(), config("VeRA", draw="stored"))


@pytest.mark.parametrize("name", METHODS)
def test_leaving_the_meta_device_draws_the_matrices(name):
    with torch.device("meta"):
        model = net()
    adapter = weft.attach(model, config(name))
    assert adapter.sites["layer"].shared.A.is_meta
    model.to_empty(device="cpu")
    wanted = weft.attach(net(), config(name)).sites["layer"].shared
    for site in adapter.sites.values():
        assert same_bits(site.shared.A, wanted.A) and same_bits(site.shared.B, wanted.B)


@pytest.mark.parametrize("name", METHODS)
def test_a_deepcopy_has_one_pair_of_its_own(name):
    a = awake(name)
    other = copy.deepcopy(a.model)
    assert len(pairs(other)) == 1 and pairs(other).isdisjoint(pairs(a.model))
    shared, theirs = (
        a.adapter.sites["mid"].shared,
        weft.adapters(other)["default"].sites["mid"].shared,
    )
    assert same_bits(shared.A, theirs.A) and shared.checksum() == theirs.checksum()
    other.to(torch.bfloat16).to(torch.float32)
    assert same_bits(shared.A, theirs.A) and len(pairs(other)) == 1


@pytest.mark.parametrize("name", METHODS)
def test_training_leaves_a_and_b_as_they_are(name):
    a = awake(name)
    A, B = (t.clone() for t in a.adapter.sites["layer"].shared.buffers())
    optimiser = torch.optim.AdamW(a.model.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(3):
        optimiser.zero_grad()
        a.run().pow(2).sum().backward()
        optimiser.step()
    shared = a.adapter.sites["layer"].shared
    assert same_bits(shared.A, A) and same_bits(shared.B, B)
    assert not shared.A.requires_grad and not shared.B.requires_grad


def test_the_checksum_tells_matrices_apart_and_not_dtypes():
    shared = weft.attach(net(), config("VeRA")).sites["layer"].shared
    assert (
        shared.checksum() == "9d840ff902c79115"
    )  # in files: SHA-256 over the float32 bits, made with oracle.philox
    assert Projections(3, 11, 11, 8, "weft").checksum() != shared.checksum()
    assert Projections(3, 11, 12, 7, "weft").checksum() != shared.checksum()
    assert Projections(3, 11, 11, 7, "weft").to(torch.bfloat16).checksum() == shared.checksum()


def test_per_layer_ranks_and_seeds_have_pairs_of_their_own():
    model = net()
    adapter = weft.attach(model, config("VeRA", targets={"layer": {"r": 9}, "mid": {}}))
    move(adapter)
    assert adapter.sites["layer"].shared.A.shape == (9, 7) and adapter.sites[
        "mid"
    ].shared.A.shape == (3, 11)
    x = inputs("linear")
    W = weft.effective_weight(model.layer)
    check_close(model.layer(x), x @ W.t() + model.layer.bias, torch.float32)


def test_a_start_from_which_nothing_can_train_is_refused():
    with pytest.raises(
        weft.ConfigError, match=r"DVoRA\(d_init=0\): with d and b both 0 no gradient"
    ):
        weft.DVoRA(d_init=0)
