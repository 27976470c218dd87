"""Gradient checkpointing gives the gradients of no checkpointing, or says why it cannot."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import weft
from support import (
    KINDS,
    RULE_VARIANTS,
    VARIANTS,
    awake,
    check_close,
    config,
    inputs,
    move,
    net,
    same_bits,
)


def gradients(a, run):
    for p in a.adapter.parameters():
        p.grad = None
    run().pow(2).sum().backward()
    return {k: p.grad.clone() for k, p in a.adapter.named_parameters()}


def recomputed(a, x=None, reentrant=False):
    """Layer and mid inside a checkpointed region, as a transformer's block would be."""
    x = a.x if x is None else x

    def block(inner):
        h = torch.tanh(a.model.layer(inner))
        return torch.tanh(
            a.model.mid(
                a.model.body(inputs_embeds=h).last_hidden_state if "body" in a.model._modules else h
            )
        )

    return a.model.head(checkpoint(block, x, use_reentrant=reentrant))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_equal_those_without_checkpointing(variant, kind):
    a = awake(variant, kind)
    wanted = gradients(a, a.run)
    for key, gradient in gradients(a, lambda: recomputed(a)).items():
        check_close(gradient, wanted[key], torch.float32, key)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_reentrant_kind_works_where_the_input_has_a_gradient(variant):
    a = awake(variant)
    x = a.x.clone().requires_grad_()
    wanted = gradients(a, lambda: a.model(x))
    for key, gradient in gradients(a, lambda: recomputed(a, x, reentrant=True)).items():
        check_close(gradient, wanted[key], torch.float32, key)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("variant", [v for v in RULE_VARIANTS if hasattr(config(v), "dropout")])
def test_dropout_repeats_where_the_model_has_another_dtype_than_the_tensors(variant, reentrant):
    """The first forward of the reentrant kind records no gradient, and must draw the mask that the
    second will draw.
    """
    a = awake(variant, dtype=torch.bfloat16, dropout=0.4)
    a.model.train()
    x = inputs("linear", dtype=torch.bfloat16).requires_grad_()
    torch.manual_seed(4)
    wanted = gradients(a, lambda: a.model(x))
    torch.manual_seed(4)
    for key, gradient in gradients(a, lambda: recomputed(a, x, reentrant)).items():
        assert same_bits(gradient, wanted[key]), key


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_rows_and_dropout_are_the_same_in_the_recomputation(dropout):
    a = awake("LoRA", dropout=dropout)
    awake("DVoRA", name="b", model=a.model, dropout=dropout)
    a.model.train()
    with weft.use(a.model, ["b", "default", None, "default"]):
        torch.manual_seed(4)
        wanted = gradients(a, a.run)
        torch.manual_seed(4)
        for key, gradient in gradients(a, lambda: recomputed(a)).items():
            check_close(gradient, wanted[key], torch.float32, key)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("after", [None, "b", ["default", "default", "default", "default"]])
def test_a_backward_under_another_adapter_is_refused(after, reentrant):
    """It would recompute the forward with the wrong adapter and give gradients that belong to no
    function.
    """
    a = awake("LoRA")
    awake("VeRA", name="b", model=a.model)
    x = a.x.clone().requires_grad_()
    with weft.use(a.model, "default"):
        loss = recomputed(a, x, reentrant).sum()
    says = r"but the forward ran under 'default'\. Call backward"
    with weft.use(a.model, after), pytest.raises(weft.WeftError, match=says):
        loss.backward()


def test_two_forwards_under_two_adapters_and_one_backward_are_refused_not_mixed_up():
    a = awake("LoRA")
    awake("VeRA", name="b", model=a.model)
    weft.use(a.model, "b")
    with weft.use(a.model, "default"):
        first = recomputed(a).sum()
    second = recomputed(a).sum()  # under "b", which is also what is active in backward
    with pytest.raises(weft.WeftError, match=r"under 'b', but the forward ran under 'default'"):
        (first + second).backward()


def test_a_pass_of_the_base_between_forward_and_backward_does_no_harm():
    """As in preference tuning, where the base is the reference."""
    a = awake("DoRA")
    wanted = gradients(a, a.run)

    def run():
        out = recomputed(a)
        with weft.use(a.model, None), torch.no_grad():
            a.run()
        with weft.use(a.model, None):
            a.run()
        return out

    for key, gradient in gradients(a, run).items():
        check_close(gradient, wanted[key], torch.float32, key)


def test_switching_thousands_of_times_in_between_is_refused_only_if_it_matters():
    a = awake("LoRA")
    loss = recomputed(a).sum()
    for _ in range(3000):
        weft.use(a.model, None)
    weft.use(a.model, "default")
    with pytest.raises(weft.WeftError, match="too many switches ago"):
        loss.backward()
    recomputed(a).sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_training_in_another_thread_than_that_of_attach(reentrant):
    """Autograd counts its nodes anew in every thread, so what was active when must be told apart by
    thread.
    """
    a = awake("LoRA")
    for _ in range(50):
        a.run().sum()  # this thread's count is far ahead
    weft.use(a.model, None)
    weft.use(a.model, "default")
    x = a.x.clone().requires_grad_()
    with ThreadPoolExecutor(1) as other:
        other.submit(lambda: recomputed(a, x, reentrant).sum().backward()).result()
        with pytest.raises(weft.WeftError, match="but the forward ran under 'default'"):
            other.submit(lambda: switched_too_early(a, x, reentrant)).result()
    recomputed(a, x, reentrant).sum().backward()


def switched_too_early(a, x, reentrant):
    loss = recomputed(a, x, reentrant).sum()
    with weft.use(a.model, None):
        loss.backward()


def test_a_copy_made_in_training_trains_on():
    a = awake("LoRA")
    recomputed(a).sum().backward()
    other = copy.deepcopy(a.model)
    adapter = weft.adapters(other)["default"]
    checkpoint(other, a.x, use_reentrant=False).sum().backward()
    assert all(p.grad is not None for p in adapter.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_without_checkpointing_backward_may_run_anywhere(variant):
    a = awake(variant)
    wanted = gradients(a, a.run)
    with weft.use(a.model, "default"):
        loss = a.run().pow(2).sum()
    for p in a.adapter.parameters():
        p.grad = None
    with weft.use(a.model, None):
        loss.backward()
    for key, p in a.adapter.named_parameters():
        check_close(p.grad, wanted[key], torch.float32, key)


def test_the_guard_costs_no_memory_of_what_was_active():
    model = net()
    adapter = weft.attach(model, config("LoRA"))
    move(adapter)
    for _ in range(5000):
        weft.use(model, "default")
    assert (
        len(next(iter(adapter.sites.values())).host.module.__dict__["_weft_switch"]._turns) <= 2000
    )
