"""Tensors that move without a step of an optimiser that holds them, where a rule follows steps: an
error, not silence.
"""

import copy

import pytest
import torch
from test_stepping import backward, fresh, step

import weft
from support import move


class Masters(torch.optim.Optimizer):
    """Steps copies of the tensors in float64 and writes the result back, past autograd's count of
    versions if `data`.
    """

    def __init__(self, tensors, data):
        self.tensors, self.data = list(tensors), data
        self.inner = torch.optim.AdamW(
            [t.detach().double().requires_grad_() for t in self.tensors], lr=0.05
        )
        super().__init__(self.inner.param_groups[0]["params"], {})

    def zero_grad(self, set_to_none=True):
        for t in self.tensors:
            t.grad = None

    @torch.no_grad()
    def step(self, closure=None):
        for t, master in zip(self.tensors, self.inner.param_groups[0]["params"], strict=True):
            master.grad = t.grad.double()
        self.inner.step()
        for t, master in zip(self.tensors, self.inner.param_groups[0]["params"], strict=True):
            (t.data if self.data else t).copy_(master)


def by_hand(tensors, data):
    class Hand:
        def zero_grad(self):
            for t in tensors:
                t.grad = None

        def step(self):
            with torch.no_grad():
                for t in tensors:
                    (t.data if data else t).sub_(0.1 * t.grad)

    tensors = list(tensors)
    return Hand()


@pytest.mark.parametrize("data", [False, True])
@pytest.mark.parametrize("make", [Masters, by_hand])
@pytest.mark.parametrize("method", ["AdaLoRA", "DyLoRA", "LoRAFA"])
def test_steps_that_are_not_seen_are_an_error_in_the_third_forward_of_the_training(
    method, make, data
):
    model, adapter, x = fresh("mine", method=method, precondition=True)
    optimiser = make(adapter.parameters(), data)
    wanted = rf"tensors of adapter 'mine' have moved, and no optimiser .* {method} acts .* Give adapter\.parameters\(\) to"
    for _ in range(2):
        step(model, x, optimiser)
    with pytest.raises(weft.UnsupportedError, match=wanted):
        step(model, x, optimiser)
    with torch.no_grad():
        model.eval()(x)
    weft.snapshot(model)


@pytest.mark.parametrize("method", ["AdaLoRA", "DyLoRA"])
def test_the_audit_sees_tensors_that_moved_while_no_step_was_counted(method):
    model, adapter, x = fresh("mine", method=method)
    fresh("other", model, method="LoRA")
    weft.use(model, "mine")
    for site in adapter.sites.values():
        site.watch = None
    for make, name in ((Masters, None), (by_hand, "mine")):
        optimiser = make(adapter.parameters(), True)
        before = weft.snapshot(model, name)
        for _ in range(3):
            step(model, x, optimiser)
        with pytest.raises(
            weft.AuditError, match=rf"adapter 'mine' have moved, and no optimiser .* {method} acts"
        ):
            weft.audit(model, before, weft.snapshot(model, name), name)
    optimiser = torch.optim.SGD(adapter.parameters(), lr=0.1)
    before = weft.snapshot(model, "mine")
    for _ in range(3):
        step(model, x, optimiser)
    weft.audit(model, before, weft.snapshot(model, "mine"), "mine")


def test_what_depends_on_no_step_may_be_moved_by_anybody():
    for method, changes in (("LoRAFA", {}), ("DyLoRA", {"r_min": 3})):
        model, adapter, x = fresh(method=method, **changes)
        optimiser = by_hand(adapter.parameters(), False)
        for _ in range(3):
            step(model, x, optimiser)
        one, *rest = adapter.parameters()
        backward(model, x)
        for tensors in ([one], rest):  # nor is it one optimiser's affair
            torch.optim.SGD(tensors, lr=0.1).step()


def test_tensors_may_be_moved_by_hand_where_no_gradient_was_before():
    """New starting values, a state that is put back, averages that are tried out, and batches left
    out after a backward.
    """
    model, adapter, x = fresh()
    move(adapter)
    kept = copy.deepcopy(model.state_dict())
    optimiser = torch.optim.SGD(adapter.parameters(), lr=0.1)
    for _ in range(2):
        for _ in range(2):
            step(model, x, optimiser)
        model.load_state_dict(kept)
        model(x)
        move(adapter)
        backward(model, x)
        backward(model, x)
        optimiser.zero_grad()
        model.eval()
        with torch.no_grad():
            averaged = [p.clone() for p in adapter.parameters()]
            move(adapter)
            model(x)
            for p, before in zip(adapter.parameters(), averaged, strict=True):
                p.copy_(before)
        model.train()
    assert adapter.steps == 0


def test_a_gradient_may_be_taken_somewhere_else_before_the_step():
    """As SAM does: climb, take the gradient there, go back, step."""
    model, adapter, x = fresh()
    optimiser = torch.optim.SGD(adapter.parameters(), lr=0.1)
    for _ in range(4):
        optimiser.zero_grad()
        backward(model, x)
        with torch.no_grad():
            climb = [0.05 * p.grad for p in adapter.parameters()]
            for sign in (1, -1):
                for p, way in zip(adapter.parameters(), climb, strict=True):
                    p.add_(sign * way)
                if sign == 1:
                    optimiser.zero_grad()
                    with torch.enable_grad():
                        backward(model, x)
        optimiser.step()
    assert adapter.steps == 4


def test_a_copy_of_a_model_whose_tensors_have_moved_starts_anew():
    model, adapter, x = fresh()
    optimiser = by_hand(adapter.parameters(), False)
    for _ in range(2):
        step(model, x, optimiser)
    copy.deepcopy(model)(x)
    with pytest.raises(weft.UnsupportedError, match="have moved, and no optimiser"):
        model(x)
