"""Rules that act around the optimiser's step: when it counts and when not, for whom, and that it
goes on after a break.
"""

import copy
import gc
import io

import pytest
import torch
from torch.optim import optimizer as torch_optimizer

import weft
from support import config, inputs, net, same_bits
from weft.model import stepping


def hooks():
    return len(torch_optimizer._global_optimizer_pre_hooks), len(
        torch_optimizer._global_optimizer_post_hooks
    )


def fresh(name="default", model=None, method="AdaLoRA", **changes):
    model = net() if model is None else model
    given = {"total_steps": 12, "interval": 1, "r_min": 1}
    made = config(method, **{**given, **changes})
    return model, weft.attach(model, made, name=name), inputs("linear")


def backward(model, x, scale=1.0):
    (model(x).sub(1).pow(2).mean() * scale).backward()


def step(model, x, optimiser):
    optimiser.zero_grad()
    backward(model, x)
    optimiser.step()


def state(adapter):
    return {**{n: p.detach() for n, p in adapter.named_parameters()}, **adapter.training_state()}


def same(a, b):
    return a.keys() == b.keys() and all(same_bits(a[k], b[k]) for k in a)


def close(a, b):
    return all(torch.allclose(a[k].double(), b[k].double(), rtol=1e-4, atol=1e-7) for k in a)


def test_hooks_are_there_from_attach_to_detach_and_for_no_other_method():
    gc.collect()
    before = hooks()
    model, _, x = fresh(method="LoRA")
    assert hooks() == before
    _, adapter, _ = fresh("ada", model)
    assert hooks() == (before[0] + 1, before[1] + 1) or before[0] > 0
    optimiser = torch.optim.SGD(adapter.parameters(), lr=0.1)
    step(model, x, optimiser)
    assert adapter.steps == 1
    weft.detach(model, "ada")
    assert adapter not in stepping._followed
    for p in adapter.parameters():
        p.grad = torch.ones_like(p)
    optimiser.step()
    assert adapter.steps == 1
    stepping._followed.clear()
    weft.detach(model)
    assert not stepping._hooks


def test_an_adapter_is_not_kept_alive():
    _, adapter, _ = fresh()
    known = len(stepping._followed)
    del adapter, _
    gc.collect()
    assert len(stepping._followed) < known


def test_gradient_accumulation_is_one_step():
    """Two halves of a batch and one step give what the whole batch gives."""
    results = []
    for parts in (1, 2):
        model, adapter, x = fresh(orthogonality=0.5)
        optimiser = torch.optim.SGD(adapter.parameters(), lr=0.5)
        for _ in range(6):
            optimiser.zero_grad()
            for part in x.chunk(parts):
                backward(model, part, 1 / parts)
            optimiser.step()
        assert adapter.steps == 6
        results.append(state(adapter))
    assert close(*results)


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_scaler_leaves_out_do_not_count_and_scaled_gradients_do_no_harm(fused):
    results = []
    for scaled in (False, True):
        model, adapter, x = fresh(orthogonality=0.5)
        optimiser = torch.optim.AdamW(adapter.parameters(), lr=0.02, fused=fused, weight_decay=0.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
        for attempt in range(8):
            optimiser.zero_grad()
            scaler.scale(model(x).sub(1).pow(2).mean()).backward()
            if attempt in (2, 5):
                next(adapter.parameters()).grad[0, 0] = float("inf")
                if not scaled:
                    continue
            scaler.step(optimiser)
            scaler.update()
        assert adapter.steps == 6
        results.append(state(adapter))
    assert close(*results)


def test_accelerate_s_optimiser_counts_once():
    import accelerate

    model, adapter, x = fresh()
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimiser = accelerator.prepare(model, torch.optim.AdamW(adapter.parameters(), lr=0.02))
    for _ in range(6):
        with accelerator.accumulate(model):
            accelerator.backward(model(x).sub(1).pow(2).mean())
            optimiser.step()
            optimiser.zero_grad()
    assert adapter.steps == 3


@pytest.mark.parametrize("keyword", [False, True])
def test_a_closure_is_evaluated_before_the_rule_looks_at_gradients(keyword):
    results = []
    for closed in (False, True):
        model, adapter, x = fresh(orthogonality=0.5)
        optimiser = torch.optim.AdamW(adapter.parameters(), lr=0.02)

        def closure(model=model, x=x, optimiser=optimiser):
            optimiser.zero_grad()
            loss = model(x).sub(1).pow(2).mean()
            loss.backward()
            return loss

        for _ in range(5):
            if not closed:
                step(model, x, optimiser)
            else:
                loss = optimiser.step(closure=closure) if keyword else optimiser.step(closure)
                assert loss.requires_grad
        assert adapter.steps == 5
        results.append(state(adapter))
    assert same(*results)


def test_two_adapters_count_for_themselves():
    model, a, x = fresh("a")
    _, b, _ = fresh("b", model, total_steps=30, seed=5)
    both = torch.optim.AdamW([*a.parameters(), *b.parameters()], lr=0.02)
    own = torch.optim.AdamW(a.parameters(), lr=0.02)
    for active, optimiser, wanted in (
        ("a", own, (1, 0)),
        ("b", both, (1, 1)),
        ("a", both, (2, 1)),
        ("b", own, (2, 1)),
    ):
        with weft.use(model, active):
            both.zero_grad()
            backward(model, x)
            optimiser.step()
        assert (a.steps, b.steps) == wanted
    with weft.use(model, ["a", "b", None, "b"]):
        step(model, x, both)
    assert (a.steps, b.steps) == (3, 2)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_steps_on_its_own(how):
    model, adapter, x = fresh()
    step(model, x, torch.optim.SGD(adapter.parameters(), lr=0.5))
    if how == "deepcopy":
        other = copy.deepcopy(model)
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    theirs = weft.adapters(other)["default"]
    optimisers = [torch.optim.SGD(a.parameters(), lr=0.5) for a in (adapter, theirs)]
    for _ in range(5):
        step(other, x, optimisers[1])
    assert (adapter.steps, theirs.steps) == (1, 6)
    for _ in range(5):
        step(model, x, optimisers[0])
    assert same(state(adapter), state(theirs))


@pytest.mark.parametrize("through", ["state_dict", "training_state"])
def test_a_resumed_run_is_the_same_bit_for_bit(through, tmp_path):
    def run(steps, model, adapter, optimiser):
        for i in range(*steps):
            step(model, inputs("linear", seed=i), optimiser)

    model, adapter, _ = fresh()
    optimiser = torch.optim.AdamW(adapter.parameters(), lr=0.02)
    run((0, 5), model, adapter, optimiser)
    kept = copy.deepcopy(optimiser.state_dict())
    if through == "state_dict":
        other, again, _ = fresh()
        other.load_state_dict(copy.deepcopy(model.state_dict()))
    else:
        weft.save(model, tmp_path)
        other = net()
        again = weft.load(other, tmp_path)
        again.load_training_state(adapter.training_state())
    second = torch.optim.AdamW(again.parameters(), lr=0.02)
    second.load_state_dict(kept)
    run((5, 12), model, adapter, optimiser)
    run((5, 12), other, again, second)
    assert adapter.steps == again.steps == 12 and same(state(adapter), state(again))
    assert sum(adapter.ranks.values()) == 4


def test_a_training_state_of_another_adapter_is_refused():
    _, adapter, _ = fresh()
    with pytest.raises(weft.CheckpointError, match="on one side only or of another shape"):
        adapter.load_training_state(fresh(r=4)[1].training_state())
    with pytest.raises(weft.CheckpointError, match=r"layer\.P_mean"):
        adapter.load_training_state({})
    assert not fresh(method="LoRA")[1].training_state()


class Around(torch.optim.Optimizer):
    """Holds all tensors and lets optimisers of parts of them step, as ZeroRedundancyOptimizer and
    SAM do.
    """

    def __init__(self, *parts, fails=False):
        self.parts, self.fails = parts, fails
        super().__init__(
            [p for part in parts for group in part.param_groups for p in group["params"]], {}
        )

    def step(self, closure=None):
        if self.fails:
            raise MemoryError
        loss = None if closure is None else closure()
        for part in self.parts:
            part.step()
        return loss


@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("parts", [1, 2])
def test_an_optimiser_within_another_one_s_step_is_part_of_it(parts, closed):
    results = []
    for around in (False, True):
        model, adapter, x = fresh(orthogonality=0.5)
        tensors = list(adapter.parameters())
        optimiser = torch.optim.SGD(tensors, lr=0.5)
        if around:
            optimiser = Around(*(torch.optim.SGD(tensors[i::parts], lr=0.5) for i in range(parts)))

        def closure(model=model, x=x, optimiser=optimiser):
            optimiser.zero_grad()
            backward(model, x)

        for _ in range(6):
            if not closed:
                closure()
            optimiser.step(closure if closed else None)
        assert adapter.steps == 6
        results.append(state(adapter))
    assert same(*results)


def test_what_an_outer_step_that_raised_has_begun_does_not_hide_a_later_one():
    model, adapter, x = fresh()
    inner = torch.optim.SGD(adapter.parameters(), lr=0.1)
    outer = Around(inner, fails=True)
    backward(model, x)
    with pytest.raises(MemoryError):
        outer.step()
    inner.step()
    assert adapter.steps == 1


def test_an_optimiser_that_evaluates_its_closure_often_takes_one_step():
    model, adapter, x = fresh()
    optimiser = torch.optim.LBFGS(adapter.parameters(), lr=0.5, max_iter=4)
    evaluated = []

    def closure():
        optimiser.zero_grad()
        loss = model(x).sub(1).pow(2).mean()
        loss.backward()
        evaluated.append(float(loss.detach()))
        return loss

    for step_taken in range(1, 4):
        optimiser.step(closure)
        assert adapter.steps == step_taken
    assert len(evaluated) > 6 and evaluated[-1] < evaluated[0]


def test_a_copied_handle_of_an_adapter_that_is_gone_does_no_harm():
    """Torch is going through its hooks when it is found out, and others may come after ours."""
    stepping._followed.clear()
    model, adapter, _ = fresh()
    handle = copy.copy(adapter)
    weft.detach(model)
    assert handle in stepping._followed
    later = torch_optimizer.register_optimizer_step_pre_hook(lambda *_: None)
    other = torch.nn.Parameter(torch.ones(3))
    other.grad = torch.ones(3)
    try:
        torch.optim.SGD([other], lr=0.1).step()
    finally:
        later.remove()
    assert handle not in stepping._followed


def test_a_copied_handle_does_not_count_a_second_time():
    model, adapter, x = fresh()
    handle = copy.copy(adapter)
    step(model, x, torch.optim.SGD(adapter.parameters(), lr=0.1))
    assert adapter.steps == handle.steps == 1


def test_tensors_that_the_user_has_frozen_belong_in_no_optimiser():
    model, adapter, x = fresh()
    frozen = adapter.sites["mid"].P.requires_grad_(False)
    kept = frozen.detach().clone()
    optimisers = [
        torch.optim.SGD([p for p in adapter.parameters() if p.requires_grad], lr=0.1)
        for _ in range(2)
    ]
    for count, optimiser in enumerate(optimisers, start=1):
        step(model, x, optimiser)
        assert adapter.steps == count
    assert frozen.grad is None and torch.equal(frozen, kept)


def test_tensors_in_two_optimisers_are_refused():
    model, adapter, x = fresh()
    one, *rest = adapter.parameters()
    optimisers = [torch.optim.SGD([one], lr=0.1), torch.optim.SGD(rest, lr=0.1)]
    backward(model, x)
    optimisers[0].step()
    with pytest.raises(
        weft.UnsupportedError, match="in two optimisers, and AdaLoRA acts once a step"
    ):
        optimisers[1].step()


def test_an_optimiser_of_other_tensors_and_a_step_without_gradients_do_not_count():
    model, adapter, x = fresh()
    backward(model, x)
    other = torch.nn.Parameter(torch.ones(3))
    other.grad = torch.ones(3)
    torch.optim.SGD([other], lr=0.1).step()
    optimiser = torch.optim.SGD(adapter.parameters(), lr=0.1)
    optimiser.zero_grad()
    optimiser.step()
    assert adapter.steps == 0
    assert model is adapter.model


def test_a_step_that_raises_leaves_nothing_behind():
    class Failing(torch.optim.SGD):
        def step(self, closure=None):
            raise MemoryError

    model, adapter, x = fresh()
    backward(model, x)
    optimiser = Failing(adapter.parameters(), lr=0.1)
    for _ in range(2):
        with pytest.raises(MemoryError):
            optimiser.step()
    assert adapter.steps == 0
    step(model, x, torch.optim.SGD(adapter.parameters(), lr=0.1))
    assert adapter.steps == 1


def test_the_audit_does_not_take_what_a_rule_carries_for_the_base():
    model, adapter, x = fresh()
    before = weft.snapshot(model)
    tensors = {k: v.clone() for k, v in model.state_dict().items()}
    optimiser = torch.optim.SGD(adapter.parameters(), lr=0.5)
    for _ in range(3):
        step(model, x, optimiser)
    weft.audit(model, before, weft.snapshot(model))
    weft.audit(model, tensors, {k: v.clone() for k, v in model.state_dict().items()})
