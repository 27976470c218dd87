"""A benchmark of nothing cannot happen: every contender has its adapter in force, and the gate sees
where one has not.
"""

import pytest
import torch

import weft
from benchmarks import cases
from benchmarks.contenders import IdleError, check
from benchmarks.factory import make
from benchmarks.peers import Dense
from benchmarks.setup import MODELS, Setup, batch, build, layers, shape, twin

TINY = Setup(model="llama-tiny", tokens=16, r=4)
NAMES = list(
    dict.fromkeys(
        n.replace(":256", ":8")
        for case in cases.FULL
        if case.kind in ("step", "kept")
        for n in case.contenders
    )
)


def made(*names, setup=TINY):
    base = build(setup)
    return [make(name, base, setup) for name in ("limit", *names)]


def gate(*contenders, setup=TINY):
    check(contenders, build(setup), batch(setup), setup)


@pytest.mark.parametrize(
    "setup",
    [
        Setup(model="gpt2-tiny", tokens=16, r=4, targets="q,v"),
        Setup(model="llama-tiny", tokens=16, r=4, dtype="bfloat16", checkpointing=True),
        Setup(model="llama-tiny", tokens=16, r=4, dropout=0.1, flow=False),
    ],
    ids=["conv1d", "bfloat16", "dropout"],
)
def test_every_contender_of_every_case_passes_the_gate(setup):
    contenders = made(
        *(n for n in NAMES[1:] if n != "dense.DoRA" or not setup.dropout), setup=setup
    )
    assert len(contenders) >= 14
    gate(*contenders, setup=setup)
    by_equation = {}
    for c in contenders:
        by_equation.setdefault(c.equation, []).append(c.name)
        assert c.name == "limit" or c.expected > 0
    assert by_equation["DoRA:4"][:2] == ["weft.DoRA", "peft.DoRA"]
    assert "peft.VeRA:8" in by_equation["VeRA:8"] and "weft.VeRA:8" in by_equation["VeRA:8"]


def test_the_gate_sees_an_adapter_that_is_switched_off():
    limit, lora = made("weft.LoRA")
    weft.use(lora.model, None)
    with pytest.raises(IdleError, match="got no gradient"):
        gate(limit, lora)


def test_the_gate_sees_a_tensor_without_gradient():
    limit, lora = made("weft.LoRA")
    name = next(n for n in lora.trained if n.endswith(".B"))
    lora.trained[name].data.zero_()
    with pytest.raises(IdleError, match=r"weft\.LoRA: .*\.A' got no gradient"):
        gate(limit, lora)


def test_the_gate_sees_a_layer_left_out():
    limit, lora = made("weft.LoRA")
    lora.trained.popitem()
    with pytest.raises(IdleError, match="the formula gives"):
        gate(limit, lora)
    lora.trained["more"] = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(IdleError, match="the formula gives"):
        gate(limit, lora)


def test_the_gate_sees_a_layer_frozen_in_the_model_and_forgotten_by_the_contender():
    limit, lora = made("weft.LoRA")
    _, p = lora.trained.popitem()
    p.requires_grad_(False)
    with pytest.raises(IdleError, match="the formula gives"):
        gate(limit, lora)


def test_the_gate_sees_two_contenders_that_compute_different_things():
    limit, ours, dense = made("weft.DoRA", "dense.DoRA")
    next(m for m in dense.model.modules() if isinstance(m, Dense)).m.data.mul_(1.5)
    with pytest.raises(IdleError, match=r"dense\.DoRA computes something else"):
        gate(limit, ours, dense)


def test_the_gate_sees_an_adapter_that_changes_nothing_though_it_gets_gradients():
    limit, lora = made("weft.LoRA")
    for n, p in lora.trained.items():
        if n.endswith(".B"):
            p.data.mul_(1e-9)
    with pytest.raises(IdleError, match="leaves the base's output as it is"):
        gate(limit, lora)


def test_contenders_share_the_frozen_weights_and_full_fine_tuning_has_its_own():
    base = build(TINY)
    limit, full = (make(name, base, TINY) for name in ("limit", "full"))
    place = base.model.layers[0].mlp.up_proj.weight.data_ptr()
    assert limit.model.model.layers[0].mlp.up_proj.weight.data_ptr() == place
    assert full.model.model.layers[0].mlp.up_proj.weight.data_ptr() != place
    assert twin(base).model.layers[0].mlp.up_proj.weight.data_ptr() == place


def test_an_unknown_contender_or_setup_is_refused_by_name():
    base = build(TINY)
    with pytest.raises(ValueError, match=r"'other\.LoRA' is no contender"):
        make("other.LoRA", base, TINY)
    with pytest.raises(ValueError, match=r"'weft\.Nothing' is no contender"):
        make("weft.Nothing", base, TINY)
    with pytest.raises(ValueError, match="peft has no DVoRA"):
        make("peft.DVoRA", base, TINY)
    with pytest.raises(ValueError, match="must be one of"):
        Setup(model="bert")
    with pytest.raises(ValueError, match="no place for dropout"):
        make("dense.DoRA", base, Setup(model="llama-tiny", tokens=16, dropout=0.1))


def test_shapes_and_layers():
    assert [shape(n) for n in (16, 128, 512, 1024, 4096)] == [
        (1, 16),
        (1, 128),
        (4, 128),
        (4, 256),
        (8, 512),
    ]
    assert all(r * n == t for t in (128, 512, 1024, 4096) for r, n in [shape(t)])
    assert len(list(layers(build(TINY), TINY))) == 2 * 7
    conv = Setup(model="gpt2-tiny", targets="q,v")
    assert [(o, i) for _, o, i in layers(build(conv), conv)] == [(96, 32)] * 2
    assert set(MODELS) >= {"llama-768", "llama-1024", "llama-2048", "roberta-base", "gpt2"}
