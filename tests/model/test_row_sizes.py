"""Rows of a mixed batch in models that lay them out by the sizes of a call: what one call has shown
says nothing of calls of other sizes.
"""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf
from test_row_layouts import NAMES, TEXT, Block, awake, check_exact, numbers, rows_of, t5
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import weft


def llama():
    config = tf.LlamaConfig(**TEXT, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    return awake(tf.LlamaForCausalLM(config))


class ByLength(Block):
    """Flattens [batch x tokens], or [tokens x batch] from 5 tokens on: one shape, two layouts."""

    def forward(self, x):
        turned = x.shape[1] > 4
        h = x.transpose(0, 1) if turned else x
        out = self.layers(h.reshape(-1, 6)).view(*h.shape[:2], 5)
        return out.transpose(0, 1) if turned else out


class BySquare(Block):
    """Is sequence-first if there are as many tokens as rows."""

    def forward(self, x):
        if x.shape[0] != x.shape[1]:
            return self.layers(x)
        return self.layers(x.transpose(0, 1)).transpose(0, 1)


class ByRows(Block):
    """Turns batches of more than three rows around, which no shape tells."""

    def forward(self, x):
        return self.layers(x.flip(0)).flip(0) if len(x) > 3 else self.layers(x)


class ByNumber(Block):
    """Is told by a number where the tokens go."""

    def forward(self, x, dim):
        return self.layers(x.transpose(0, dim)).transpose(0, dim)


class ByOther(Block):
    """Is sequence-first if there are few places of context."""

    def forward(self, x, context):
        if context.shape[1] > 2:
            return self.layers(x) + context.mean(1, keepdim=True)
        return self.layers(x.transpose(0, 1)).transpose(0, 1) + context.mean(1, keepdim=True)


class ByWords(Block):
    """Leaves out the positions of one word, which a probe need not have tried."""

    def forward(self, ids):
        kept = ids != 7
        out = self.table.weight.new_zeros(*ids.shape, 5)
        out[kept] = self.layers(self.table(ids)[kept])
        return out


@pytest.mark.parametrize("cls", [ByLength, BySquare])
def test_a_layout_that_depends_on_the_sizes_is_exact_for_each(cls):
    model = awake(cls())
    for rows, tokens in ((4, 3), (4, 4), (4, 8), (2, 6), (3, 3), (4, 3), (4, 8), (4, 1)):
        x = torch.randn(rows, tokens, 6, dtype=torch.float64)
        check_exact(model, NAMES[:rows], {"x": x}, rows_of(x=x))


def test_a_batch_that_is_turned_around_by_its_size_is_refused():
    model, names = awake(ByRows()), ["a", "b", None, "a"]
    x = numbers(4, 3, 6)
    check_exact(model, names[:3], {"x": x[:3]}, rows_of(x=x))
    with weft.use(model, names), pytest.raises(weft.UnsupportedError, match="batch of their own"):
        model(x)


def test_a_number_or_another_input_may_decide_too():
    model, x = awake(ByNumber()), numbers(4, 4, 6)
    for dim in (0, 1, 0):
        check_exact(
            model, NAMES, {"x": x, "dim": dim}, lambda i, d=dim: {"x": x[i : i + 1], "dim": d}
        )
    model = awake(ByOther())
    for places in (3, 1, 2, 5):
        context = numbers(4, places, 5)
        given = {"x": x, "context": context}
        check_exact(model, NAMES, given, rows_of(**given))


def test_a_layer_whose_input_has_another_size_than_was_seen_is_refused():
    model, ids = awake(ByWords(), ["first"]), torch.tensor([[1, 2, 3, 4], [4, 3, 2, 1]])
    check_exact(model, ["a", "b"], {"ids": ids}, rows_of(ids=ids))
    ids = torch.tensor([[1, 7, 7, 7], [7, 7, 7, 2]])  # two positions, as many as rows
    with weft.use(model, ["b", "a"]), pytest.raises(weft.WeftError, match="has not been"):
        model(ids=ids)
    ids = torch.tensor([[1, 2, 3, 7], [2, 7, 7, 7]])  # four of six: two are the other row's
    with weft.use(model, ["b", "a"]), pytest.raises(weft.WeftError, match="has not been"):
        model(ids=ids)


def test_a_part_of_the_model_is_looked_at_for_each_size():
    model = nn.ModuleDict({"part": ByLength()})
    awake(model)
    for tokens in (4, 6, 4):
        x = torch.randn(4, tokens, 6, dtype=torch.float64)
        with torch.no_grad(), weft.use(model, NAMES):
            mixed = model["part"](x)
        for i, name in enumerate(NAMES):
            with torch.no_grad(), weft.use(model, name):
                torch.testing.assert_close(mixed[i], model["part"](x[i : i + 1])[0])


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_model_is_looked_at_for_each_size(dynamic):
    torch._dynamo.reset()
    model = awake(ByLength())
    compiled = torch.compile(model, backend="eager", dynamic=dynamic)
    for tokens in (4, 6, 8, 3):
        x = torch.randn(4, tokens, 6, dtype=torch.float64)
        with torch.no_grad():
            with weft.use(compiled, NAMES):
                found = compiled(x)
            for i, name in enumerate(NAMES):
                with weft.use(model, name):
                    torch.testing.assert_close(found[i], model(x[i : i + 1])[0])


def test_a_forward_that_backward_runs_again_has_the_layout_of_its_sizes():
    model = awake(ByLength()).train()

    def gradients(x, rows):
        parameters = [p for a in weft.adapters(model).values() for p in a.parameters()]
        run = torch.utils.checkpoint.checkpoint
        out = run(model, x, use_reentrant=False) if rows else model(x)
        return torch.autograd.grad(out.pow(2).sum(), parameters, allow_unused=True)

    for tokens in (4, 6):
        x = torch.randn(4, tokens, 6, dtype=torch.float64)
        with weft.use(model, NAMES):
            mixed = gradients(x, rows=True)
        total = [torch.zeros_like(g) for g in mixed]
        for i, name in enumerate(NAMES):
            if name is None:
                continue
            with weft.use(model, name):
                own = gradients(x[i : i + 1], rows=False)
            total = [t if g is None else t + g for t, g in zip(total, own, strict=True)]
        torch.testing.assert_close(list(mixed), total)


class OfPacked(Block):
    """Reads the numbers of a PackedSequence: the first tokens of all rows, then the second, ..."""

    def forward(self, packed):
        return self.layers(packed.data)


def test_a_packed_sequence_is_refused():
    model = awake(OfPacked())
    for lengths in ((3, 2), (2, 2)):
        packed = pack_sequence([numbers(n, 6) for n in lengths])
        with (
            weft.use(model, ["a", "b"]),
            pytest.raises(weft.UnsupportedError, match="of their own"),
        ):
            model(packed)


class Counted(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))
        self.calls = 0
        self.inner.register_forward_hook(self._own)

    def _own(self, module, args, output):
        self.calls += 1
        return output * 2

    def forward(self, x):
        return self.inner(x)


def test_hooks_of_the_user_see_the_users_calls():
    model = awake(Counted())
    seen, x = [], numbers(4, 3, 6)
    first = model.inner[0]
    for module in (model, model.inner, first):
        module.register_forward_hook(lambda *a: seen.append("after"))
        module.register_forward_pre_hook(lambda *a, **k: seen.append("before"), with_kwargs=True)
    whole = torch.nn.modules.module.register_module_forward_hook(lambda *a: seen.append("any"))
    hooks = [dict(m._forward_hooks) for m in model.modules()]
    try:
        with torch.no_grad(), weft.use(model, NAMES):
            model(x)
    finally:
        whole.remove()
    once = [seen.count(which) for which in ("before", "after")]
    assert once == [3, 3] and model.calls == 1
    modules = len([m for m in model.modules() if "weft" not in type(m).__module__ and m.children])
    assert seen.count("any") == 5 <= modules
    assert [dict(m._forward_hooks) for m in model.modules()] == hooks
    check_exact(model, NAMES, {"x": x}, rows_of(x=x))


def test_a_hook_that_the_model_cannot_run_without_takes_part():
    model, x = awake(Block()), numbers(4, 3, 6).float()
    model.forward = model.layers
    model.first.register_forward_pre_hook(lambda module, args: (args[0].double(),))
    check_exact(model, NAMES, {"x": x}, rows_of(x=x))
    assert copy.deepcopy(model) is not model


@pytest.mark.parametrize(("build", "most"), [(t5, 2), (llama, 1)])
def test_the_steps_of_decoding_are_not_looked_at_one_by_one(build, most, monkeypatch):
    from weft.model import row_calls

    model, looks, own = build(), [], row_calls.Probe
    monkeypatch.setattr(row_calls, "Probe", lambda *a: looks.append(a) or own(*a))
    x = torch.randint(3, 50, (4, 6))
    given = {"attention_mask": torch.ones_like(x), "max_new_tokens": 6, "do_sample": False}
    with weft.use(model, NAMES):
        first = model.generate(x, eos_token_id=None, **given)
        assert len(looks) == most
        assert torch.equal(model.generate(x, eos_token_id=None, **given), first)
    assert len(looks) == most


def test_embeddings_as_inputs_of_any_length():
    model = llama()
    for tokens in (4, 6, 1):
        x = torch.randn(4, tokens, 16, dtype=torch.float64)
        check_exact(model, NAMES, {"inputs_embeds": x}, rows_of(inputs_embeds=x))
