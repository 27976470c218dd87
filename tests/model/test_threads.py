"""One model, many threads and tasks: each caller gets its own adapter, always, and nobody a mixture."""

import asyncio
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import weft
from support import awake, check_close, config, move, net, same_bits
from weft.model import gate

ROUNDS = 120  # per thread


def crowd(variants=("LoRA", "DoRA", "VeRA", "DVoRA")):
    """A model with several adapters, its input, and each one's own answer, the base's under None."""
    model, adapters = net(), {}
    for i, variant in enumerate(variants):
        found = awake(variant, name=f"a{i}", model=model, seed=i)
        adapters[f"a{i}"] = found.adapter
    x, answers = found.x, {}
    for name in (None, *adapters):
        with weft.use(model, name), torch.no_grad():
            answers[name] = model(x)
    return model, adapters, x, answers


def together(jobs):
    """Runs all jobs at the same time, each in a thread of its own; raises the first error."""
    start = threading.Barrier(len(jobs))

    def run(job):
        start.wait()
        return job()

    with ThreadPoolExecutor(len(jobs)) as pool:
        return [f.result() for f in [pool.submit(run, job) for job in jobs]]


def test_threads_with_different_adapters_and_rows_each_get_their_own():
    model, adapters, x, answers = crowd()
    rows = ["a0", None, "a3", "a1"]
    by_row = torch.cat([answers[name][i : i + 1] for i, name in enumerate(rows)])

    def caller(seed):
        choose = random.Random(seed)
        for _ in range(ROUNDS):
            which = choose.choice([None, *adapters, rows])
            with weft.use(model, which), torch.no_grad():
                found = model(x)
            wanted = by_row if which is rows else answers[which]
            check_close(found, wanted, torch.float32, f"{which}")

    together([lambda seed=seed: caller(seed) for seed in range(6)])


def test_a_statement_stays_with_its_thread_and_others_have_the_one_attached_last():
    model, _, x, answers = crowd()
    weft.use(model, "a1")
    with torch.no_grad(), ThreadPoolExecutor(1) as pool:
        check_close(pool.submit(model, x).result(), answers["a3"], torch.float32)
        pool.submit(lambda: weft.use(model, "a2")).result()
        check_close(pool.submit(model, x).result(), answers["a2"], torch.float32)
        assert same_bits(model(x), answers["a1"])


def test_tasks_of_one_thread_each_get_their_own():
    model, adapters, x, answers = crowd()

    async def caller(name):
        for _ in range(60):
            with weft.use(model, name):
                await asyncio.sleep(0)
                with torch.no_grad():  # which is the thread's, so not across an await
                    found = model(x)
                await asyncio.sleep(0)
                with torch.no_grad():
                    assert same_bits(found, answers[name]) and same_bits(model(x), found)
        return name

    async def main():
        return await asyncio.gather(*(caller(name) for name in [None, *adapters] * 2))

    assert len(asyncio.run(main())) == 10


def test_threads_that_train_different_adapters_get_the_gradients_of_one_thread():
    """With checkpointing, whose recomputation runs in backward."""
    model, adapters, x, _ = crowd()

    def gradients(name, checkpointed):
        with weft.use(model, name):
            if checkpointed:
                hidden = checkpoint(lambda x: torch.tanh(model.layer(x)), x, use_reentrant=False)
                out = model.head(torch.tanh(model.mid(hidden)))
            else:
                out = model(x)
        loss = out.pow(2).sum()  # backward runs under the thread's own default
        return torch.autograd.grad(loss, list(adapters[name].parameters()))

    wanted = {name: gradients(name, checkpointed=False) for name in adapters}

    def caller(name):
        for _ in range(ROUNDS // 2):
            for ours, theirs in zip(gradients(name, True), wanted[name], strict=True):
                check_close(ours, theirs, torch.float32, name)

    together([lambda name=name: caller(name) for name in adapters])


def test_adapters_that_train_base_tensors_take_turns():
    """Their copies stand where the model reads the originals: one set at a time."""
    model, adapters, x, answers = crowd(("BitFit", "LoRA", "Full"))

    def caller(name):
        for _ in range(ROUNDS):
            with weft.use(model, name), torch.no_grad():
                assert same_bits(model(x), answers[name]), name

    together([lambda name=name: caller(name) for name in [None, *adapters]])
    assert same_bits(model.layer.weight, model.layer.weight)


def test_attaching_loading_and_detaching_do_not_disturb_running_answers(tmp_path):
    model, adapters, x, answers = crowd()
    weft.save(model, tmp_path / "a0", name="a0")
    done = threading.Event()

    def caller(name):
        while not done.is_set():
            with weft.use(model, name), torch.no_grad():
                check_close(model(x), answers[name], torch.float32, f"{name}")

    def changer():
        try:
            for i in range(40):
                move(weft.attach(model, config("DoRA", seed=i), name="new"), seed=i)
                weft.detach(model, "new")
                weft.load(model, tmp_path / "a0", name="again")
                with weft.use(model, "again"), torch.no_grad():
                    check_close(model(x), answers["a0"], torch.float32)
                weft.detach(model, "again")
        finally:
            done.set()

    together([changer, *(lambda name=name: caller(name) for name in (None, *adapters))])
    assert list(weft.adapters(model)) == list(adapters)


def test_a_merge_waits_or_is_refused_while_others_answer():
    model, _adapters, x, answers = crowd()
    done, refused, merged = threading.Event(), [], []

    def caller(name):
        while not done.is_set():
            try:
                with weft.use(model, name), torch.no_grad():
                    found = model(x)
            except weft.MergeError:  # somebody has merged: refused before any compute
                continue
            check_close(found, answers[name], torch.float32, f"{name}")

    def merger():
        try:
            for _ in range(60):
                try:
                    weft.merge(model, "a0")
                except weft.MergeError as error:
                    refused.append(str(error))
                    continue
                merged.append(1)
                with torch.no_grad():
                    check_close(model(x), answers["a0"], torch.float32)
                for _ in range(1000):
                    try:
                        weft.unmerge(model)
                        break
                    except weft.MergeError:
                        continue
        finally:
            done.set()

    together([merger, *(lambda name=name: caller(name) for name in ("a1", "a2", None))])
    assert all("another thread or task is inside" in text for text in refused)
    assert merged or refused
    with torch.no_grad(), weft.use(model, None):
        assert same_bits(model(x), answers[None])


class Slow(nn.Module):
    """A model whose forward stops in the middle until it is told to go on."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.inside, self.go_on = threading.Event(), threading.Event()

    def forward(self, x):
        h = self.one(x)
        self.inside.set()
        self.go_on.wait(20)
        return self.two(h)


@pytest.mark.parametrize("change", ["attach", "detach", "merge", "load"])
def test_a_change_waits_for_the_forward_in_its_middle(change, tmp_path):
    model = Slow()
    model.go_on.set()
    for name in ("a", "b"):
        move(weft.attach(model, weft.LoRA(r=2, targets=["one", "two"]), name=name))
    weft.save(model, tmp_path / "b", name="b")
    x = torch.randn(3, 4)
    with torch.no_grad():
        wanted = model(x)
    model.go_on.clear()
    model.inside.clear()
    changes = {
        "attach": lambda: weft.attach(model, weft.DoRA(r=2, targets=["one"]), name="c"),
        "detach": lambda: weft.detach(model, "b"),
        "merge": lambda: weft.merge(model, "a"),
        "load": lambda: weft.load(model, tmp_path / "b", name="c"),
    }

    def forward():
        with torch.no_grad():
            return model(x)

    with ThreadPoolExecutor(2) as pool:
        answer = pool.submit(forward)
        assert model.inside.wait(20)
        changed = pool.submit(changes[change])
        with pytest.raises(TimeoutError):
            changed.result(0.3)
        model.go_on.set()
        assert same_bits(answer.result(20), wanted)
        changed.result(20)


def test_a_caller_is_not_kept_waiting_for_ever(monkeypatch):
    monkeypatch.setattr(gate, "PATIENCE", 0.2)
    model = Slow()
    weft.attach(model, weft.LoRA(r=2, targets=["one"]), name="a")
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(model, torch.randn(3, 4))
        assert model.inside.wait(20)
        with pytest.raises(weft.WeftError, match="cannot detach adapter 'a': other threads"):
            weft.detach(model, "a")
        model.go_on.set()
        answer.result(20)
    weft.detach(model, "a")


def test_an_adapter_in_use_by_an_open_block_cannot_be_detached():
    a = awake("LoRA")
    awake("VeRA", name="b", model=a.model)
    with weft.use(a.model, ["default", None, "b", "b"]):
        for name in ("default", "b"):
            with pytest.raises(
                weft.WeftError, match=rf"{name}' is used by an open `with weft\.use"
            ):
                weft.detach(a.model, name)
    weft.detach(a.model, "b")


def test_a_thread_whose_adapter_was_detached_is_told():
    a = awake("LoRA")
    awake("VeRA", name="b", model=a.model)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(weft.use, a.model, "b").result()
        weft.detach(a.model, "b")
        with pytest.raises(
            weft.WeftError, match=r"'b', which this caller has chosen, was detached"
        ):
            pool.submit(a.model, a.x).result()


def test_rows_that_name_a_merged_adapter_are_refused():
    a = awake("LoRA")
    weft.merge(a.model)
    with pytest.raises(weft.MergeError, match="is merged into the weights"):
        weft.use(a.model, ["default", None, None, "default"])


def test_a_forward_that_fails_leaves_the_gate_open():
    a = awake("LoRA")
    with pytest.raises(RuntimeError):
        a.model(torch.randn(3, 99))
    with ThreadPoolExecutor(1) as pool:
        pool.submit(weft.detach, a.model, "default").result(20)


def test_a_choice_that_is_refused_leaves_the_gate_open():
    a = awake("LoRA")
    awake("VeRA", name="b", model=a.model)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(weft.use, a.model, "b").result()
        weft.merge(a.model, "default")
        with pytest.raises(weft.MergeError, match="this caller has chosen 'b'"):
            pool.submit(a.model, a.x).result()
        weft.unmerge(a.model)
        pool.submit(weft.detach, a.model, "default").result(20)
