"""What a review made go wrong without a word, each as the property that it broke."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import weft
from support import awake, check_close, config, distance, move, net, same_bits, set_way
from weft.ops import cache, input_cache


@pytest.mark.parametrize("inner", [False, True], ids=["inner", "inner-reentrant"])
@pytest.mark.parametrize("outer", [False, True], ids=["outer", "outer-reentrant"])
def test_nested_checkpoints_recompute_what_the_forward_used(outer, inner):
    a = awake("LoRA")
    b = awake("DoRA", name="b", model=a.model)
    a.model.train()
    x = a.x.clone().requires_grad_()

    def block(x):
        return torch.tanh(a.model.layer(x))

    def both(x):
        return torch.tanh(a.model.mid(checkpoint(block, x, use_reentrant=inner)))

    with weft.use(a.model, "default"):
        both(x).pow(2).sum().backward()
        wanted = [p.grad.clone() for p in a.adapter.parameters()]
    for p in (*a.adapter.parameters(), *b.adapter.parameters()):
        p.grad = None
    with weft.use(a.model, "default"):
        loss = checkpoint(both, x, use_reentrant=outer).pow(2).sum()
    loss.backward()  # under "b", which was attached last
    assert all(p.grad is None for p in b.adapter.parameters())
    for p, gradient in zip(a.adapter.parameters(), wanted, strict=True):
        check_close(p.grad, gradient, torch.float32)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputation_with_other_base_tensors_is_refused(reentrant):
    a = awake("BitFit")
    a.model.train()
    x = a.x.clone().requires_grad_()
    weft.use(a.model, None)
    with weft.use(a.model, "default"):
        loss = checkpoint(lambda x: torch.tanh(a.model.layer(x)), x, use_reentrant=reentrant).sum()
    with pytest.raises(weft.WeftError, match="needs its own base tensors here"):
        loss.backward()


def refill(x, value):
    x.detach().numpy()[...] = value


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("rows", [False, True])
def test_an_input_buffer_that_is_filled_again_through_numpy_is_another_input(
    rows, grad, monkeypatch
):
    set_way(monkeypatch, "fused")
    model = nn.ModuleDict({"q": nn.Linear(6, 5), "k": nn.Linear(6, 5)})
    model.forward = lambda x: model["q"](x) + model["k"](x)
    for name in ("a", "b"):
        move(weft.attach(model, weft.VeRA(r=4, targets=["q", "k"]), name=name))
    x = torch.ones(3, 2, 6)
    with torch.set_grad_enabled(grad), weft.use(model, ["a", "b", None] if rows else "a"):
        model(x)
        refill(x, 2.0)
        check_close(model(x), model(x.clone()), torch.float32)


def test_vera_may_be_checkpointed_if_two_layers_read_the_input_of_a_region(monkeypatch):
    set_way(monkeypatch, "fused")
    model = nn.ModuleDict({"q": nn.Linear(6, 5), "k": nn.Linear(6, 5)})
    adapter = weft.attach(model, weft.VeRA(r=4, targets=["q", "k"]))
    move(adapter)
    both = lambda x: torch.tanh(model["q"](x)) * model["k"](x)  # noqa: E731
    model.forward = lambda x: checkpoint(both, x, use_reentrant=False)
    x = torch.randn(3, 6, requires_grad=True)
    found = torch.autograd.grad(model(x).sum(), [x, *adapter.parameters()])
    for ours, theirs in zip(
        found, torch.autograd.grad(both(x).sum(), [x, *adapter.parameters()]), strict=True
    ):
        check_close(ours, theirs, torch.float32)


def test_vera_may_run_one_input_twice_before_the_first_backward(monkeypatch):
    set_way(monkeypatch, "fused")
    model = nn.Sequential(nn.Linear(6, 5))
    adapter = weft.attach(model, weft.VeRA(r=4, targets=["0"]))
    move(adapter)
    x = torch.randn(3, 6, requires_grad=True)
    first, second = model(x).sum(), model(x).sum()
    first.backward()
    second.backward()
    assert x.grad is not None


def replaced(model):
    state = {k: v.clone() * 2 for k, v in model.state_dict().items() if ".weft." not in k}
    model.load_state_dict(state, assign=True, strict=False)


def another_parameter(model):
    model.layer.weight = nn.Parameter(model.layer.weight.detach().clone())


def edited(model):
    with torch.no_grad():
        model.mid.weight.mul_(2)


@pytest.mark.parametrize("change", [replaced, another_parameter, edited])
def test_unmerge_refuses_weights_that_are_not_those_of_the_merge(change):
    a = awake("LoRA")
    weft.merge(a.model)
    change(a.model)
    with pytest.raises(weft.MergeError, match=r"weight' was (replaced|written to).*keep_merged"):
        weft.unmerge(a.model)
    weft.detach(a.model, "default", keep_merged=True)


def test_a_part_of_the_model_waits_for_a_merge_too():
    a = awake("LoRA")
    body, x, done = nn.Sequential(a.model.layer), a.x, threading.Event()
    with torch.no_grad():
        wanted = body(x)

    def caller():
        while not done.is_set():
            with torch.no_grad():
                check_close(body(x), wanted, torch.float32)

    with ThreadPoolExecutor(2) as pool:
        answers = pool.submit(caller)
        try:
            for _ in range(60):
                weft.merge(a.model)
                weft.unmerge(a.model)
        finally:
            done.set()
        answers.result(20)


def test_a_merge_inside_a_block_leaves_nothing_of_the_block_behind():
    a = awake("LoRA")
    awake("VeRA", name="b", model=a.model)
    with torch.no_grad():
        by_default = a.run()
        with weft.use(a.model, "default"):
            weft.merge(a.model, "default")
        weft.unmerge(a.model)
        assert same_bits(a.run(), by_default)
        with ThreadPoolExecutor(1) as pool:  # the block that was left does not count any more
            block = pool.submit(lambda: weft.use(a.model, "b")).result()
            pool.submit(block.__enter__).result()
            with pytest.raises(weft.MergeError, match="another thread or task is inside"):
                weft.merge(a.model, "b")
            pool.submit(block.__exit__, None, None, None).result()
        weft.merge(a.model, "b")


def test_a_task_cannot_merge_inside_the_block_of_the_task_that_started_it():
    a = awake("LoRA")

    async def child():
        with pytest.raises(weft.MergeError, match="another thread or task is inside"):
            weft.merge(a.model)

    async def parent():
        with weft.use(a.model, "default"):
            await asyncio.create_task(child())

    asyncio.run(parent())


def test_an_interrupted_forward_keeps_nobody_out():
    class Interrupted(nn.Module):
        def forward(self, x):
            raise KeyboardInterrupt

    model = nn.Sequential(nn.Linear(4, 4), Interrupted())
    weft.attach(model, weft.LoRA(r=2, targets=["0"]), name="a")
    with pytest.raises(KeyboardInterrupt):
        model(torch.randn(2, 4))
    with ThreadPoolExecutor(1) as pool:
        pool.submit(weft.detach, model, "a").result(20)


def test_after_an_interrupt_a_part_is_a_part_again():
    class Interrupted(nn.Module):
        def forward(self, x):
            raise KeyboardInterrupt

    model = nn.Sequential(nn.Linear(4, 4), Interrupted())
    weft.attach(model, weft.LoRA(r=2, targets=["0"]), name="a")
    with pytest.raises(KeyboardInterrupt):
        model(torch.randn(2, 4))
    with weft.use(model, "a"):
        assert not input_cache.in_forward()
        model[0](torch.randn(2, 4))


def test_the_gate_never_asks_for_the_frames_of_all_threads(monkeypatch):
    """`sys._current_frames()` can collect garbage while it holds the interpreter's lock of threads."""
    monkeypatch.delattr("sys._current_frames")
    test_an_interrupted_forward_keeps_nobody_out()


def test_tasks_and_a_compiled_model_are_refused():
    a = awake("LoRA")
    torch.compile(a.model, backend="eager")(a.x)

    async def task():
        with pytest.raises(weft.UnsupportedError, match="asyncio task of a compiled model"):
            weft.use(a.model, "default")

    asyncio.run(task())
    torch.compiler.reset()


@pytest.mark.parametrize("variant", ["LoRA", "DoRA"])
def test_a_weight_that_is_normalised_after_attach_still_gives_its_own_answer(variant):
    a = awake(variant)
    with torch.no_grad():
        before = a.run()
        parametrizations.weight_norm(a.model.mid)
        check_close(a.run(), before, torch.float32)


@pytest.mark.parametrize("method", ["DoRA", "DVoRA"])
def test_averaged_weights_are_seen_where_numbers_are_not_compared_in_every_call(
    method, monkeypatch
):
    """As on a GPU: once per forward of the model."""
    set_way(monkeypatch, "native")
    monkeypatch.setattr(cache, "compared", set())
    a = awake(method)
    a.model.eval()
    with torch.no_grad():
        a.run(), a.run()
        for p in a.adapter.parameters():
            p.data.copy_(p.data * 1.5 + 0.1)
        found = a.run()
        b = weft.attach(net(), config(method), name="b")
        for mine, theirs in zip(b.parameters(), a.adapter.parameters(), strict=True):
            mine.copy_(theirs)
        b.model.eval()
        check_close(found, b.model(a.x), torch.float32)
        for p in a.adapter.parameters():
            p.data.neg_()
        assert distance(a.run(), found) > 1e-3


def test_a_stale_norm_is_found_by_the_audit_and_at_save_and_merge(tmp_path, monkeypatch):
    """One number of a large W, edited where no call looks."""
    set_way(monkeypatch, "native")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 300))
    adapter = weft.attach(model, weft.DoRA(r=2, targets=["0"]))
    move(adapter)
    x = torch.randn(3, 300)
    for check in (
        lambda _: weft.merge(model),
        lambda _: weft.save(model, tmp_path / "a"),
        lambda before: weft.audit(model, before, weft.snapshot(model)),
    ):
        with torch.no_grad():
            model(x)
            before = weft.snapshot(model)
            model[0].weight.data[7, 3] += 50.0
        with pytest.raises(weft.WeftError, match="used an old norm"):
            check(before)
    weft.save(model, tmp_path / "a")  # the norm was dropped, so the next try is right


def test_a_row_edited_through_data_is_seen_in_evaluation_at_once_and_in_training_at_the_next_step(
    monkeypatch,
):
    set_way(monkeypatch, "native")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 290)).eval()
    adapter = weft.attach(model, weft.DoRA(r=2, targets=["0"]))
    move(adapter)
    optimiser = torch.optim.SGD(adapter.parameters(), lr=1e-3)
    x = torch.randn(3, 300)

    def right():
        check_close(
            model(x), x @ weft.effective_weight(model[0]).t() + model[0].bias, torch.float32
        )

    right()
    model[0].weight.data[1] += 0.5
    right()
    model.train()
    for edit in (lambda W: W[1].add_(0.5), lambda W: W[7, 3].add_(50.0)):
        right()
        edit(model[0].weight.data)
        model(x).pow(2).sum().backward()
        optimiser.step()
        right()
