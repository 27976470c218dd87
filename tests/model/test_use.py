"""Switching: the base, one adapter, and back; what is not there fails before any compute."""

import pytest
import torch

import weft
from support import (
    PROMPTS,
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


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_base_is_the_base_bit_for_bit_while_adapters_are_attached(variant):
    model, x = net(variant=variant), inputs("linear")
    before = model(x)
    a = awake(variant, model=model)
    with weft.use(model, None):
        assert same_bits(model(x), before)
        assert all(not key.endswith("weft") for key, _ in model.named_parameters(recurse=False))
    assert distance(model(x), before) > 1e-2
    weft.use(model, None)
    assert same_bits(model(x), before)
    weft.use(model, "default")
    check_close(model(x), oracle_output(a, a.declared()), torch.float32)


def test_adapters_of_every_method_live_side_by_side():
    model, adapters = net(variant=PROMPTS[0]), []
    for i, variant in enumerate(VARIANTS):
        adapters.append(awake(variant, name=f"a{i}", model=model, seed=i, r=2 + i))
    for i in [*reversed(range(len(VARIANTS))), *range(len(VARIANTS))]:
        with weft.use(model, f"a{i}"):
            check_close(
                model(adapters[i].x),
                oracle_output(adapters[i], adapters[i].declared()),
                torch.float32,
                VARIANTS[i],
            )
    assert list(weft.adapters(model)) == [f"a{i}" for i in range(len(VARIANTS))]


def test_use_puts_back_what_was_active_even_after_an_error():
    a = awake("LoRA")
    awake("VeRA", name="b", model=a.model)
    weft.use(a.model, "b")
    with_b = a.run()
    with (
        pytest.raises(ZeroDivisionError),
        weft.use(a.model, "default"),
        weft.use(a.model, [None] * 4),
    ):
        raise ZeroDivisionError
    assert same_bits(a.run(), with_b)


def test_attaching_makes_the_new_adapter_active():
    a = awake("LoRA")
    fresh = weft.attach(a.model, config("DoRA"), name="fresh")
    with weft.use(a.model, None):
        base = a.run()
    assert same_bits(a.run(), base)
    move(fresh)
    assert distance(a.run(), base) > 1e-2


@pytest.mark.parametrize("asked", ["defualt", ["default", "defualt"], ["default", 3]])
def test_unknown_names_fail_before_any_compute(asked):
    a = awake("LoRA")
    a.model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(
        weft.WeftError,
        match=r"no adapter is named ('defualt'|3) on this Net\. Nearest: \['default'\]",
    ):
        weft.use(a.model, asked)


def test_no_names_and_no_adapter_are_errors():
    a = awake("LoRA")
    with pytest.raises(weft.WeftError, match="give one name or None per row"):
        weft.use(a.model, [])
    with pytest.raises(
        weft.WeftError, match=r"Net carries no adapter\. Attach one with weft\.attach"
    ):
        weft.use(net(), None)


def test_only_the_active_adapters_tensors_get_gradients():
    a = awake("LoRA")
    b = awake("DVoRA", name="b", model=a.model)
    with weft.use(a.model, "b"):
        a.run().sum().backward()
    assert all(p.grad is None for p in a.adapter.parameters())
    assert all(p.grad is not None for p in b.adapter.parameters())
    assert all(p.grad is None for n, p in a.model.named_parameters() if ".weft." not in n)


def test_parallel_wrappers_and_compiled_models_are_seen_through():
    a = awake("LoRA")
    for wrapped in (torch.nn.DataParallel(a.model), torch.compile(a.model, backend="eager")):
        with weft.use(wrapped, None):
            assert weft.adapters(wrapped)["default"] is a.adapter
        assert weft.adapters(wrapped) == weft.adapters(a.model)


def test_a_model_of_the_users_with_one_child_called_module_is_no_wrapper():
    class Doubles(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.module = torch.nn.Linear(7, 11)

        def forward(self, x):
            return 2 * self.module(x)

    model = Doubles()
    adapter = weft.attach(model, config("LoRA", targets="all-linear"))
    move(adapter)
    assert list(adapter.sites) == ["module"] and adapter.model is model
    weft.merge(model, verify=inputs("linear"))
