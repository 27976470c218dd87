"""A generator that is paused inside `with weft.use(...)` chooses for nobody, and for itself once it goes
on.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import weft
from support import awake, same_bits

PAUSED = r"'a' was chosen by the generator \w+ \(line \d+ of .*test_generators.py\), which yields"


@pytest.fixture
def a():
    found = awake("LoRA", name="a")
    awake("VeRA", name="b", model=found.model, seed=3)
    return found


def answers(a):
    """What each adapter and the base give."""
    found = {}
    for name in ("a", "b", None):
        with weft.use(a.model, name):
            found[name] = a.run()
    return found


def stream(a, name="a", n=3):
    with weft.use(a.model, name):
        for _ in range(n):
            yield a.run()


def test_a_consumer_is_told_or_chooses_for_itself(a):
    of = answers(a)
    assert same_bits(a.run(), of["b"])
    for step, found in enumerate(stream(a)):
        assert same_bits(found, of["a"]), "whatever the consumer has chosen"
        if step == 0:
            with pytest.raises(weft.WeftError, match=PAUSED):
                a.run()
            with pytest.raises(weft.WeftError, match=PAUSED):
                a.model.layer(a.x)  # a part
        with weft.use(a.model, None):
            assert same_bits(a.run(), of[None])
        if step == 1:
            weft.use(a.model, "b")
            assert same_bits(a.run(), of["b"])
    assert same_bits(a.run(), of["b"])
    weft.use(a.model, None)
    assert list(map(len, stream(a, n=1))) and same_bits(a.run(), of[None])


def test_generators_that_take_turns(a):
    of = answers(a)
    for mine, base, theirs in zip(
        stream(a), stream(a, None), stream(a, ["a", "b", None, "b"]), strict=True
    ):
        assert same_bits(mine, of["a"]) and same_bits(base, of[None])
        assert torch.allclose(theirs[0], of["a"][0], atol=1e-6)
        assert torch.allclose(theirs[1], of["b"][1], atol=1e-6)
    assert same_bits(a.run(), of["b"]) and not a.model._weft_model_state.active.blocks


@pytest.mark.parametrize("end", ["close", "drop", "throw", "exhaust"])
def test_its_end_gives_back_what_was_there(a, end):
    of, running = answers(a), stream(a)
    next(running)
    if end == "close":
        running.close()
    elif end == "throw":
        with pytest.raises(ZeroDivisionError):
            running.throw(ZeroDivisionError())
    elif end == "exhaust":
        list(running)
    del running
    gc.collect()
    assert same_bits(a.run(), of["b"])


def test_an_end_inside_another_block_leaves_that_alone(a):
    of, running = answers(a), stream(a)
    next(running)
    with weft.use(a.model, None):
        running.close()
        assert same_bits(a.run(), of[None])
    assert same_bits(a.run(), of["b"])


def test_what_happens_inside_a_generator_is_its_own(a):
    of = answers(a)

    def inner():
        with weft.use(a.model, None):
            return a.run()

    def outer():
        with weft.use(a.model, "a"):
            yield a.run()
            with weft.use(a.model, "b"):
                yield a.run()
            yield a.run()
            yield inner()
            yield a.run()
            weft.use(a.model, None)
            yield a.run()

    weft.use(a.model, "b")
    for found, name in zip(outer(), ["a", "b", "a", None, "a", None], strict=True):
        assert same_bits(found, of[name])
        with weft.use(a.model, "b"):
            assert same_bits(a.run(), of["b"])
    assert same_bits(a.run(), of["b"])


def test_every_step_in_another_thread_with_another_context(a):
    of, running = answers(a), stream(a, n=4)
    with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second:
        for pool in (first, second, first, second):
            context = contextvars.copy_context()
            assert same_bits(pool.submit(context.run, next, running).result(), of["a"])
            assert same_bits(a.run(), of["b"])
        assert next(running, None) is None
    assert same_bits(a.run(), of["b"])


def test_context_managers_choose_for_their_caller(a):
    of = answers(a)

    @contextlib.contextmanager
    def adapter(name):
        with contextlib.ExitStack() as stack:
            stack.enter_context(weft.use(a.model, name))
            yield

    def pieces():
        with adapter("a"):
            yield a.run()
            yield a.run()

    with adapter("a"):
        assert same_bits(a.run(), of["a"])
        with adapter(None):
            assert same_bits(a.run(), of[None])
        assert same_bits(a.run(), of["a"])
    assert same_bits(a.run(), of["b"])
    for found in pieces():
        assert same_bits(found, of["a"])
        with pytest.raises(weft.WeftError, match=PAUSED):
            a.run()
    assert same_bits(a.run(), of["b"])


@pytest.fixture
def chosen(a):
    with weft.use(a.model, "a"):
        yield answers(a)


def test_a_fixture_chooses_for_its_test(a, chosen):
    assert same_bits(a.run(), chosen["a"])


def test_asynchronous_generators(a):
    of = answers(a)

    async def pieces():
        with weft.use(a.model, "a"):
            for _ in range(2):
                await asyncio.sleep(0)
                yield await asyncio.to_thread(a.run)
                await asyncio.sleep(0)
                yield await asyncio.create_task(task())

    async def task():
        return a.run()

    async def consumer():
        async for found in pieces():
            assert same_bits(found, of["a"])
            with pytest.raises(weft.WeftError, match=PAUSED):
                a.run()
            with pytest.raises(weft.WeftError, match=PAUSED):
                await asyncio.create_task(task())
            with weft.use(a.model, None):
                assert same_bits(await asyncio.create_task(task()), of[None])
        assert same_bits(a.run(), of["b"])
        async for _ in pieces():
            break
        gc.collect()
        await asyncio.sleep(0.01)  # the loop closes it in a task of its own
        assert same_bits(a.run(), of["b"])

    asyncio.run(consumer())
    assert same_bits(a.run(), of["b"])


def test_a_generator_with_strengths(a):
    """Paused, it chooses for nobody, and for itself once it goes on, between rows of its consumer."""
    strengths, of = {"a": 0.5, "b": -2}, answers(a)
    with weft.use(a.model, strengths):
        wanted = a.run()
    for found in stream(a, strengths):
        assert same_bits(found, wanted)
        with pytest.raises(
            weft.WeftError, match=r"the sum .*'a': 0.5.* was chosen by the generator"
        ):
            a.run()
        with weft.use(a.model, ["b", "b", None, "a"]):
            rows = a.run()
        assert torch.allclose(rows[0], of["b"][0], atol=1e-6)
        with weft.use(a.model, {"b": 1}):
            assert torch.allclose(a.run(), of["b"], atol=1e-6)
            with pytest.raises(weft.WeftError, match="'b' is used by an open"):
                weft.detach(a.model, "b")


def test_changes_of_the_model_while_a_generator_is_paused(a):
    running = stream(a)
    next(running)
    with pytest.raises(weft.WeftError, match="'a' is used by an open"):
        weft.detach(a.model, "a")
    weft.detach(a.model, "b")
    running.close()
    weft.detach(a.model, "a")
