"""Keys and values, states and encoded inputs are read only under the adapter that computed them."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
import transformers as tf
from torch import nn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache, StaticCache

import weft
from support import check_close

OTHER = r"filled under {}, and now {} is active.*Begin a new cache"
# transformers 5.24 has renamed the argument
CACHE = (
    "cache"
    if "cache" in inspect.signature(tf.LlamaForCausalLM.forward).parameters
    else "past_key_values"
)
TINY = {
    "vocab_size": 50,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}


def awake(model, targets="all-linear"):
    for i, name in enumerate("ab"):
        adapter = weft.attach(model, weft.LoRA(r=2 + i, seed=i, targets=targets), name=name)
        torch.manual_seed(i)
        with torch.no_grad():
            for p in adapter.parameters():
                p.add_(0.5 * torch.randn_like(p))
    return model.double().eval()


def llama():
    config = tf.LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        **TINY,
    )
    return awake(tf.LlamaForCausalLM(config))


def t5():
    config = tf.T5Config(
        d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0, **TINY
    )
    return awake(tf.T5ForConditionalGeneration(config))


def mamba():
    config = tf.MambaConfig(
        hidden_size=16, num_hidden_layers=2, state_size=4, time_step_rank=4, **TINY
    )
    return awake(tf.MambaForCausalLM(config), ["in_proj", "x_proj", "out_proj"])  # dt_proj is read


def saved(cache):
    return pickle.loads(pickle.dumps(cache))  # noqa: S301 - its own bytes


def ids(*shape):
    return torch.randint(3, 50, shape, generator=torch.Generator().manual_seed(7))


def prefill(model, which, rows=2, **given):
    with torch.no_grad(), weft.use(model, which):
        return model(input_ids=ids(rows, 5), use_cache=True, **given)[CACHE]


@torch.no_grad()
def step(model, which, cache, rows=2):
    with weft.use(model, which):
        return model(input_ids=ids(rows, 1), **{CACHE: cache}).logits


@pytest.mark.parametrize(
    ("before", "after", "texts"),
    [
        ("a", "b", ("'a'", "'b'")),
        ("a", None, ("'a'", "the base")),
        (None, "b", ("the base", "'b'")),
        (["a", "b"], ["b", "a"], (r"rows \['a', 'b'\]", r"rows \['b', 'a'\]")),
        (["a", None], "a", (r"rows \['a', the base\]", "'a'")),
        ("a", ["a", "b"], ("'a'", r"rows \['a', 'b'\]")),
        ("a", {"a": 0.5}, ("'a'", "the sum {'a': 0.5}")),
        ({"a": 0.5, "b": 1}, "b", ("the sum {'a': 0.5, 'b': 1.0}", "'b'")),
        ({"a": 0.5, "b": 1}, None, ("the sum {'a': 0.5, 'b': 1.0}", "the base")),
        ({"a": 0.5}, {"a": 0.7}, ("the sum {'a': 0.5}", "the sum {'a': 0.7}")),
        (["a", "b"], {"a": 1, "b": 1}, (r"rows \['a', 'b'\]", "the sum {'a': 1.0, 'b': 1.0}")),
    ],
)
def test_another_adapter_than_the_one_that_filled_a_cache_is_refused(before, after, texts):
    model = llama()
    cache = prefill(model, before)
    with pytest.raises(weft.WeftError, match=OTHER.format(*texts)):
        step(model, after, cache)
    step(model, before, cache)


@pytest.mark.parametrize(
    "same",
    [
        ("a", ["a", "a"]),
        (["b", "b"], "b"),
        (None, [None, None]),
        ({"a": 0.5, "b": 2}, {"b": 2.0, "a": 0.5}),
        ({"a": 1, "b": 0}, "a"),
        (None, {"a": 0.0}),
    ],
    ids=str,
)
def test_one_adapter_for_all_rows_is_that_adapter(same):
    model = llama()
    step(model, same[1], prefill(model, same[0]))


def test_a_cache_of_whatever_kind():
    model = llama()
    with torch.no_grad():
        for cache in (
            DynamicCache(config=model.config),
            StaticCache(config=model.config, max_cache_len=16),
        ):
            prefill(model, "a", **{CACHE: cache})
            for found in (cache, copy.deepcopy(cache), saved(cache)):
                with pytest.raises(weft.WeftError, match=OTHER.format("'a'", "'b'")):
                    step(model, "b", found)
                step(model, "a", found)
            cache.reset()
            prefill(model, "b", **{CACHE: cache})


def test_a_recurrent_state():
    model = mamba()
    with torch.no_grad():
        with weft.use(model, "a"):
            found = model(input_ids=ids(2, 5), use_cache=True)[CACHE]
        with weft.use(model, "b"), pytest.raises(weft.WeftError, match=OTHER.format("'a'", "'b'")):
            model(input_ids=ids(2, 1), **{CACHE: found})
        with weft.use(model, "a"):
            model(input_ids=ids(2, 1), **{CACHE: found})


def test_what_an_encoder_computed_and_what_generate_returns():
    model, given = t5(), {"decoder_input_ids": ids(2, 1)}
    with torch.no_grad():
        with weft.use(model, "a"):
            encoded = model.get_encoder()(input_ids=ids(2, 5))
            out = model(encoder_outputs=encoded, use_cache=True, **given)
            assert isinstance(out[CACHE], EncoderDecoderCache)
            sequence = model.generate(
                input_ids=ids(2, 5), max_new_tokens=3, return_dict_in_generate=True
            )
        for part in (
            {"encoder_outputs": encoded},
            {"encoder_outputs": tuple(encoded.values())},
            {"encoder_outputs": encoded, CACHE: out[CACHE]},
            {"input_ids": ids(2, 5), CACHE: sequence[CACHE]},
        ):
            with (
                weft.use(model, "b"),
                pytest.raises(weft.WeftError, match=OTHER.format("'a'", "'b'")),
            ):
                model(**part, **given)


class Recurrent(nn.Module):
    """Returns its states as a tuple, and takes them so."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x, states=None):
        h = self.layer(x) if states is None else self.layer(x + states[0])
        return h, (h, h * 2)


def test_states_in_a_tuple():
    model, x = awake(Recurrent()), torch.randn(2, 4, dtype=torch.float64)
    with weft.use(model, "a"):
        y, states = model(x)
        model(x, states)
    with weft.use(model, "b"), pytest.raises(weft.WeftError, match=OTHER.format("'a'", "'b'")):
        model(x, states)
    with weft.use(model, "b"):
        model(y)  # a plain output is an input like any other
    assert not vars(states[0])


def test_a_part_of_the_model_called_alone():
    model = llama()
    with torch.no_grad():
        with weft.use(model, "a"):
            cache = model.model(input_ids=ids(2, 5), **{CACHE: DynamicCache()})[CACHE]
        for part in (model, model.model):
            with (
                weft.use(model, "b"),
                pytest.raises(weft.WeftError, match=OTHER.format("'a'", "'b'")),
            ):
                part(input_ids=ids(2, 1), **{CACHE: cache})
        with weft.use(model, "a"):
            model.model(input_ids=ids(2, 1), **{CACHE: cache})


def test_another_adapter_of_the_same_name():
    model = llama()
    cache = prefill(model, "a")
    weft.detach(model, "a")
    weft.attach(model, weft.LoRA(r=2), name="a")
    with pytest.raises(weft.WeftError, match="filled under 'a', which was detached, and now 'a'"):
        step(model, "a", cache)


def test_an_adapter_of_a_sum_that_was_replaced():
    model = llama()
    strengths = {"a": 0.5, "b": 0.5}
    cache = prefill(model, strengths)
    step(model, strengths, copy.deepcopy(cache))
    step(model, strengths, saved(cache))
    weft.detach(model, "a")
    weft.attach(model, weft.LoRA(r=2), name="a")
    with pytest.raises(weft.WeftError, match=r"filled under the sum .*, which was detached"):
        step(model, strengths, cache)


def test_a_merged_adapter_is_the_adapter():
    model = llama()
    cache = prefill(model, "a")
    weft.use(model, "a")
    wanted = step(model, "a", copy.deepcopy(cache))
    weft.merge(model, "a")
    check_close(model(input_ids=ids(2, 1), **{CACHE: cache}).logits, wanted, torch.float64)
    cache = model(input_ids=ids(2, 5), use_cache=True)[CACHE]
    weft.unmerge(model)
    with pytest.raises(weft.WeftError, match=OTHER.format("'a'", "'b'")):
        step(model, "b", cache)


def test_rows_of_a_cache_may_be_selected_repeated_and_reordered():
    model = llama()

    def cache():
        return prefill(model, ["a", None, "b"], rows=3)

    for change, names in (
        (lambda c: c.batch_select_indices(torch.tensor([2, 0])), ["b", "a"]),
        (lambda c: c.batch_repeat_interleave(2), ["a", "a", None, None, "b", "b"]),
        (lambda c: c.reorder_cache(torch.tensor([1, 0, 2])), [None, "a", "b"]),
        (lambda c: c.batch_select_indices(torch.tensor([1])), [None]),
        (lambda c: c.batch_select_indices(torch.tensor([2])), "b"),
        (lambda c: c.crop(-2), ["a", None, "b"]),
    ):
        changed = cache()
        change(changed)
        rows = changed.layers[0].keys.shape[0]
        wrong = "a" if rows == 1 else ["a", "b", None, "b", "a", "a"][:rows]
        if wrong != names:
            with pytest.raises(weft.WeftError, match="key-value cache was filled under rows"):
                step(model, wrong, changed, rows)
        step(model, names, changed, rows)


def test_beams_that_exchange_caches_have_one_adapter():
    model = llama()
    given = {"num_beams": 2, "max_new_tokens": 8, "do_sample": False}
    x = ids(2, 4)
    mask = torch.ones_like(x)
    with weft.use(model, ["a", "a", "b", "b"]):
        mixed = model.generate(x, attention_mask=mask, **given)
    for i, name in enumerate("ab"):
        with weft.use(model, name):
            alone = model.generate(x[i : i + 1], attention_mask=mask[i : i + 1], **given)
        assert torch.equal(mixed[i, : alone.shape[1]], alone[0])
    with weft.use(model, ["a", "b", "a", "b"]), pytest.raises(weft.WeftError, match="filled under"):
        model.generate(x, attention_mask=mask, **given)


def test_a_cache_from_elsewhere_is_reported():
    model = llama()
    config = model.config
    for name in ("a", "b"):
        weft.detach(model, name)
    cache = model(input_ids=ids(2, 5), use_cache=True)[CACHE]
    awake(model)
    with pytest.warns(UserWarning, match="before an adapter was attached.* 'a' computed them"):
        step(model, "a", cache)
    step(model, None, DynamicCache(config=config))


def test_the_caches_of_a_part_are_checked_once_for_all_its_layers(monkeypatch):
    from weft.model import cache_marks

    model, looks = llama(), []
    own = cache_marks.check_part
    monkeypatch.setattr(cache_marks, "check_part", lambda *a: looks.append(a) or own(*a))
    with torch.no_grad(), weft.use(model, "a"):
        model.model(input_ids=ids(2, 5))
        assert len(looks) == 1
        model.model.layers[0].mlp(torch.randn(2, 5, 16, dtype=torch.float64))
        model.model(input_ids=ids(2, 5))
    assert len(looks) == 3


class Outer(nn.Module):
    """Is no part of the model, and calls one with several caches."""

    def __init__(self, model):
        super().__init__()
        self.model = [model]

    def forward(self, *caches):
        return [self.model[0].model(input_ids=ids(2, 1), **{CACHE: cache}) for cache in caches]


def test_each_call_of_a_part_is_checked_whoever_calls_it():
    model = llama()
    of_a, of_b = prefill(model, "a"), prefill(model, "b")
    with torch.no_grad(), weft.use(model, "a"):
        Outer(model)(of_a, of_a)
        with pytest.raises(weft.WeftError, match=OTHER.format("'b'", "'a'")):
            Outer(model)(of_a, of_b)
        Outer(copy.deepcopy(model))(of_a)


@pytest.mark.parametrize("order", [[1, 0], [1, 1], [0, 0]])
def test_rows_that_differ_by_the_rows_of_new_tokens_alone(order):
    """All keys and values of the first positions are the same under both adapters."""
    model = llama()
    for name in "ab":
        weft.detach(model, name)
    for i, name in enumerate("ab"):
        made = weft.LoRA(r=2, targets=["q_proj"], new_tokens=[40])
        adapter = weft.attach(model, made, name=name)
        with torch.no_grad():
            next(iter(adapter.token_rows.values())).add_(i + 0.5)
    model.double()
    words = torch.tensor([[5, 6, 40, 7]] * 2)
    with torch.no_grad(), weft.use(model, ["a", "b"]):
        cache = model(input_ids=words, use_cache=True)[CACHE]
    cache.reorder_cache(torch.tensor(order))
    with pytest.raises(weft.WeftError, match="filled under rows"):
        step(model, ["a", "b"], cache)
    step(model, ["ab"[i] for i in order], cache)


def test_rows_of_a_recurrent_state_that_change_places():
    model, names = mamba(), ["a", "b"]
    with torch.no_grad(), weft.use(model, names):
        state = model(input_ids=ids(2, 5), use_cache=True)[CACHE]
    step(model, names, state)
    state.reorder_cache(torch.tensor([1, 0]))
    with pytest.raises(weft.WeftError, match="filled under rows"):
        step(model, names, state)
    step(model, ["b", "a"], state)


def test_a_static_cache_whose_rows_change_places():
    model, names = llama(), ["a", None, "b"]
    cache = StaticCache(config=model.config, max_cache_len=16)
    prefill(model, names, rows=3, **{CACHE: cache})
    step(model, names, cache, rows=3)
    cache.reorder_cache(torch.tensor([2, 1, 0]))
    with pytest.raises(weft.WeftError, match="filled under rows"):
        step(model, names, cache, rows=3)
    step(model, names[::-1], cache, rows=3)
    step(model, names[::-1], copy.deepcopy(cache), rows=3)


@pytest.mark.parametrize("which", ["a", ["a", None], {"a": 0.5, "b": 1.0}], ids=str)
def test_an_adapter_that_has_changed_since(which):
    changed = r"filled under .*whose tensors have changed since.*Begin a new cache"
    model = llama()
    adapter = weft.adapters(model)["a"]
    cache = prefill(model, which)
    step(model, which, copy.deepcopy(cache))
    parameters = list(adapter.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    with weft.use(model, "a"):
        model(input_ids=ids(2, 3)).logits.sum().backward()
    optimizer.step()
    twin = copy.deepcopy(model)
    for one in (model, twin):
        with pytest.raises(weft.WeftError, match=changed):
            step(one, which, copy.deepcopy(cache))
    cache = prefill(model, which)
    step(model, which, cache)
    step(copy.deepcopy(model), which, copy.deepcopy(cache))
    step(pickle.loads(pickle.dumps(model)), which, copy.deepcopy(cache))  # noqa: S301
    with torch.no_grad():
        parameters[3].mul_(0.5)
    with pytest.raises(weft.WeftError, match=changed):
        step(model, which, cache)
    of_base = prefill(model, None)
    with torch.no_grad():
        parameters[3].mul_(2.0)
    step(model, None, of_base)


def test_an_adapter_of_other_ranks_has_changed():
    model = llama()
    weft.detach(model, "a")
    adapter = weft.attach(model, weft.DyLoRA(r=4, targets="all-linear"), name="a")
    model.double()
    cache = prefill(model, "a")
    adapter.truncate(2)
    with pytest.raises(weft.WeftError, match="whose tensors have changed since"):
        step(model, "a", cache)
