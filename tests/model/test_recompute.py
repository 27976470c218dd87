"""Gradient checkpointing gives the gradients of no checkpointing, or says why it cannot."""

import copy
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

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
def test_a_backward_under_another_adapter_recomputes_what_the_forward_used(after, reentrant):
    """With the adapter of the moment it would give gradients that belong to no function."""
    a = awake("LoRA")
    awake("VeRA", name="b", model=a.model)
    a.model.train()  # a checkpoint of the reentrant kind is noticed in training
    x = a.x.clone().requires_grad_()
    weft.use(a.model, "default")
    wanted = gradients(a, lambda: a.model(x))
    for p in a.adapter.parameters():
        p.grad = None
    with weft.use(a.model, "default"):
        loss = recomputed(a, x, reentrant).pow(2).sum()
    with weft.use(a.model, after):
        loss.backward()
    for key, p in a.adapter.named_parameters():
        check_close(p.grad, wanted[key], torch.float32, key)


@pytest.mark.parametrize("reentrant", [False, True])
def test_two_forwards_under_two_adapters_and_one_backward_are_not_mixed_up(reentrant):
    a = awake("LoRA")
    b = awake("VeRA", name="b", model=a.model)
    a.model.train()
    x = a.x.clone().requires_grad_()
    both = [*a.adapter.parameters(), *b.adapter.parameters()]
    with weft.use(a.model, "default"):
        wanted = torch.autograd.grad(a.model(x).pow(2).sum(), list(a.adapter.parameters()))
    with weft.use(a.model, "b"):
        wanted += torch.autograd.grad(a.model(x).pow(2).sum(), list(b.adapter.parameters()))
    for p in both:
        p.grad = None
    weft.use(a.model, "b")
    with weft.use(a.model, "default"):
        first = recomputed(a, x, reentrant).pow(2).sum()
    second = recomputed(a, x, reentrant).pow(2).sum()
    (first + second).backward()
    for p, gradient in zip(both, wanted, strict=True):
        check_close(p.grad, gradient, torch.float32)


def test_a_region_that_switches_by_itself_switches_again_in_its_recomputation():
    a = awake("LoRA")
    b = awake("DoRA", name="b", model=a.model)
    weft.use(a.model, None)

    def region(x):
        with weft.use(a.model, "default"):
            h = torch.tanh(a.model.layer(x))
        with weft.use(a.model, "b"):
            return torch.tanh(a.model.mid(h))

    both = [*a.adapter.parameters(), *b.adapter.parameters()]
    wanted = torch.autograd.grad(region(a.x).pow(2).sum(), both, allow_unused=True)
    found = checkpoint(region, a.x, use_reentrant=False).pow(2).sum()
    found = torch.autograd.grad(found, both, allow_unused=True)
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            check_close(ours, theirs, torch.float32)


def test_a_checkpoint_within_a_checkpoint_recomputes_what_the_forward_used():
    a = awake("LoRA")
    awake("DoRA", name="b", model=a.model)
    weft.use(a.model, "default")
    inner = lambda x: torch.tanh(a.model.layer(x))  # noqa: E731
    outer = lambda x: torch.tanh(a.model.mid(checkpoint(inner, x, use_reentrant=False)))  # noqa: E731
    wanted = gradients(a, lambda: outer(a.x))
    for p in a.adapter.parameters():
        p.grad = None
    loss = checkpoint(outer, a.x, use_reentrant=False).pow(2).sum()
    with weft.use(a.model, "b"):
        loss.backward()
    for key, p in a.adapter.named_parameters():
        if p.grad is not None:
            check_close(p.grad, wanted[key], torch.float32, key)


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


@pytest.mark.parametrize("reentrant", [False, True])
def test_backward_in_another_thread_recomputes_what_the_forward_used(reentrant):
    """Autograd runs the backward of a GPU in threads of its own, which have chosen nothing."""
    a = awake("LoRA")
    awake("VeRA", name="b", model=a.model)  # attached last, so the default of every other thread
    a.model.train()
    x = a.x.clone().requires_grad_()
    with weft.use(a.model, "default"):
        wanted = gradients(a, lambda: a.model(x))
        for p in a.adapter.parameters():
            p.grad = None
        loss = recomputed(a, x, reentrant).pow(2).sum()
    with ThreadPoolExecutor(1) as other:
        other.submit(loss.backward).result()
    for key, p in a.adapter.named_parameters():
        check_close(p.grad, wanted[key], torch.float32, key)


def test_a_recomputation_of_which_nothing_is_known_is_refused():
    """A reentrant checkpoint in evaluation leaves no note; with one adapter none is needed."""
    model = net().eval()
    adapter = weft.attach(model, config("LoRA"))
    move(adapter)
    a = SimpleNamespace(model=model, x=inputs("linear"))
    x = a.x.clone().requires_grad_()
    recomputed(a, x, reentrant=True).sum().backward()
    awake("VeRA", name="b", model=model)
    with weft.use(model, "default"):
        loss = recomputed(a, x, reentrant=True).sum()
    with pytest.raises(weft.WeftError, match="use_reentrant=False"):
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
