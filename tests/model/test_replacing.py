"""`weft.load(..., replace=True)`: another adapter under the same name, while callers compute."""

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import weft
from support import awake, check_close, config, net, same_bits
from weft.model import open_blocks


def versions(folder, variants=("LoRA", "DoRA"), **changes):
    """Adapters on the disk, by name of their folder, and the answer of each."""
    answers = {}
    for i, variant in enumerate(variants):
        a = awake(variant, seed=i, r=2 + i, **changes)
        with torch.no_grad():
            next(a.adapter.parameters()).mul_(1 + i)
            answers[str(i)] = a.run()
        weft.save(a.model, folder / str(i))
    return answers, a.x


@pytest.mark.parametrize("variants", [("LoRA", "DoRA"), ("VeRA", "LoRA"), ("Full", "LoRA")])
def test_the_new_one_answers_under_the_old_name_and_what_is_active_stays(variants, tmp_path):
    answers, x = versions(tmp_path, variants)
    model = net()
    base = model(x)
    old = weft.load(model, tmp_path / "0", name="a")
    awake("LoRA", model=model, name="b", seed=9)
    other = model(x)
    new = weft.load(model, tmp_path / "1", name="a", replace=True)
    assert new.is_attached and not old.is_attached
    assert list(weft.adapters(model)) == ["a", "b"] and weft.adapters(model)["a"] is new
    assert same_bits(model(x), other)  # b is active still
    with torch.no_grad(), weft.use(model, "a"):
        check_close(model(x), answers["1"], torch.float32)
        weft.use(model, "a")
    weft.detach(model, "b")
    weft.detach(model, "a")
    assert same_bits(model(x), base) and not [k for k in model.state_dict() if "weft" in k]


def test_the_only_adapter_can_be_replaced_and_an_absent_one_is_loaded(tmp_path):
    answers, x = versions(tmp_path)
    model = net()
    flags = [p.requires_grad for p in model.parameters()]
    weft.load(model, tmp_path / "0", name="a", replace=True)
    weft.load(model, tmp_path / "1", name="a", replace=True)
    with torch.no_grad():
        check_close(model(x), answers["1"], torch.float32)  # it is still the default
    weft.detach(model, "a")
    assert [p.requires_grad for p in model.parameters()] == flags


def test_a_file_that_does_not_fit_leaves_the_old_one(tmp_path):
    answers, x = versions(tmp_path)
    model = net()
    old = weft.load(model, tmp_path / "0", name="a")
    (tmp_path / "1" / "adapter_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(weft.CheckpointError):
        weft.load(model, tmp_path / "1", name="a", replace=True)
    with pytest.raises(weft.WeftError, match=r"already attached .* replace=True"):
        weft.load(model, tmp_path / "0", name="a")
    with torch.no_grad():
        assert old.is_attached and same_bits(model(x), answers["0"])


def test_every_block_is_wholly_old_or_wholly_new(tmp_path):
    """Five threads compute without pause, each block twice, while the adapter goes back and forth."""
    answers, x = versions(tmp_path)
    model = net()
    weft.load(model, tmp_path / "0", name="a")
    awake("VeRA", model=model, name="b", seed=5)
    with weft.use(model, "b"), torch.no_grad():
        b = model(x)
    stop, seen, blocks = threading.Event(), set(), []

    def which(found):
        near = [n for n, y in answers.items() if (found - y).abs().max() < 1e-4]
        assert len(near) == 1, "an answer of neither version"
        return near[0]

    def caller(rows):
        while not stop.is_set():
            with weft.use(model, ["a", "b", "a", "b"] if rows else "a"), torch.no_grad():
                first, second = model(x), model(x)
            if rows:
                check_close(first[1::2], b[1::2], torch.float32)
                near = [n for n, y in answers.items() if (first - y)[::2].abs().max() < 1e-4]
                assert len(near) == 1 and (first - second).abs().max() < 1e-4
            else:
                blocks.append((which(first), which(second)))

    def plain():
        weft.use(model, "a")
        while not stop.is_set():
            with torch.no_grad():
                seen.add(which(model(x)))

    with ThreadPoolExecutor(5) as pool:
        jobs = [pool.submit(caller, rows) for rows in (False, False, True)]
        jobs += [pool.submit(plain) for _ in range(2)]
        i = 0
        while i < 20 or (i < 2000 and not len(seen) == len(set(blocks)) == 2):
            i += 1
            weft.load(model, tmp_path / str(i % 2), name="a", replace=True)
            time.sleep(0.005)
        stop.set()
        for job in jobs:
            job.result()
    assert all(first == second for first, second in blocks)
    assert len(set(blocks)) == len(seen) == 2


def test_a_replacement_waits_for_a_block_and_new_blocks_wait_for_it(tmp_path):
    answers, x = versions(tmp_path)
    model = net()
    weft.load(model, tmp_path / "0", name="a")
    inside, go, order = threading.Event(), threading.Event(), []

    def holder():
        with weft.use(model, "a"), torch.no_grad():
            inside.set()
            go.wait(20)
            with weft.use(model, None), weft.use(model, "a"):  # a nested block does not wait
                check_close(model(x), answers["0"], torch.float32)
            order.append("old")

    def replacer():
        inside.wait(20)
        weft.load(model, tmp_path / "1", name="a", replace=True)
        order.append("replaced")

    def late():
        with weft.use(model, "a"), torch.no_grad():
            check_close(model(x), answers["1"], torch.float32)
            order.append("new")

    with ThreadPoolExecutor(3) as pool:
        jobs = [pool.submit(holder), pool.submit(replacer)]
        inside.wait(20)
        state = model.__dict__["_weft_model_state"]
        while "a" not in state.open._closing:
            time.sleep(0.001)
        jobs.append(pool.submit(late))
        with torch.no_grad(), weft.use(model, None):
            model(x)  # others compute meanwhile
        time.sleep(0.02)
        assert order == []
        go.set()
        for job in jobs:
            job.result()
    assert order[0] == "old" and set(order) == {"old", "replaced", "new"}


def test_a_block_within_a_forward_does_not_wait_for_a_replacement_that_waits_for_the_forward(
    tmp_path,
):
    answers, x = versions(tmp_path)
    model = net()
    weft.load(model, tmp_path / "0", name="a")
    state = model.__dict__["_weft_model_state"]
    inside = threading.Event()

    def hook(module, args):
        if not inside.is_set():
            inside.set()
            while not state.gate._wanted:
                time.sleep(0.001)
            with weft.use(model, "a"):
                pass

    model.mid.register_forward_pre_hook(hook)

    def forward():
        with torch.no_grad():
            return model(x)

    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(forward)
        inside.wait(20)
        weft.load(model, tmp_path / "1", name="a", replace=True)
        check_close(job.result(), answers["0"], torch.float32)


def test_a_block_of_this_thread_is_an_error_at_once(tmp_path, monkeypatch):
    """Its own, that of a paused generator, or that of another task: none could end meanwhile."""
    versions(tmp_path)
    model = net()
    weft.load(model, tmp_path / "0", name="a")

    def replace():
        weft.load(model, tmp_path / "1", name="a", replace=True)

    says = "used by an open `with weft.use.* of this thread"
    with weft.use(model, ["a", None]), pytest.raises(weft.WeftError, match=says):
        replace()

    def paused():
        with weft.use(model, "a"):
            yield

    generator = paused()
    next(generator)
    with pytest.raises(weft.WeftError, match=says):
        replace()
    generator.close()

    async def tasks():
        entered, leave = asyncio.Event(), asyncio.Event()

        async def other():
            with weft.use(model, "a"):
                entered.set()
                await leave.wait()

        job = asyncio.create_task(other())
        await entered.wait()
        with pytest.raises(weft.WeftError, match=says):
            replace()
        leave.set()
        await job

    asyncio.run(tasks())
    replace()
    monkeypatch.setattr(open_blocks, "PATIENCE", 0.05)
    says = "blocks of other threads have kept the adapter"
    with (
        weft.use(model, "a"),
        ThreadPoolExecutor(1) as pool,
        pytest.raises(weft.WeftError, match=says),
    ):
        pool.submit(replace).result()
    replace()  # nothing is left closed


def test_what_cannot_take_the_old_ones_place_is_refused(tmp_path):
    model = net()
    a = awake("LoRA", model=model, name="a")
    for name, changes in (("head", {"modules_to_save": ["head"]}), ("branch", {})):
        other = net()
        weft.attach(other, config("LoRA" if changes else "Bottleneck", **changes))
        weft.save(other, tmp_path / name)
    weft.use(model, ["a", None])
    with pytest.raises(weft.UnsupportedError, match=r"trains base tensors .* in use by row"):
        weft.load(model, tmp_path / "head", name="a", replace=True)
    weft.use(model, {"a": 0.5})
    with pytest.raises(weft.UnsupportedError, match=r"is not a low-rank.*in use with strengths"):
        weft.load(model, tmp_path / "branch", name="a", replace=True)
    weft.use(model, "a")
    weft.merge(model, "a")
    with pytest.raises(weft.MergeError, match="is merged"):
        weft.load(model, tmp_path / "branch", name="a", replace=True)
    weft.unmerge(model)
    assert a.adapter.is_attached


@pytest.mark.parametrize("which", [["a", None], {"a": 0.5}], ids=str)
def test_only_a_choice_that_is_in_use_stands_in_the_way(which, tmp_path):
    """A sum or rows of another adapter, of the past, or of a caller that has ended do not."""
    model, other = net(), net()
    awake("LoRA", model=model, name="a")
    awake("LoRA", model=model, name="b")
    weft.attach(other, config("LoRA", modules_to_save=["head"]))
    weft.save(other, tmp_path)
    chosen, leave = threading.Event(), threading.Event()

    def hold():
        weft.use(model, which)
        model(net_inputs)
        chosen.set()
        leave.wait(30)

    net_inputs = awake("LoRA").x[:2]
    with weft.use(model, which):
        model(net_inputs)
    weft.use(model, ["b", None])
    thread = threading.Thread(target=hold)
    thread.start()
    chosen.wait(30)
    with pytest.raises(weft.UnsupportedError, match="is in use"):
        weft.load(model, tmp_path, name="a", replace=True)
    leave.set()
    thread.join()
    new = weft.load(model, tmp_path, name="a", replace=True)
    with weft.use(model, "a"):
        torch.testing.assert_close(model(net_inputs), other(net_inputs))
    assert new.is_attached
