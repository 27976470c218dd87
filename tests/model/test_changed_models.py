"""A model that is changed after attach: a layer that was replaced, resized or tied is named at the next
forward, save, merge and audit; what does no harm is let through.
"""

import copy
import pickle

import pytest
import torch
from torch import nn

import weft
from support import PROMPTS, awake, config, inputs, move, net, same_bits

TINY = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "pad_token_id": 0,
}


def llama(**changes):
    import transformers

    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{**TINY, "tie_word_embeddings": False, **changes})
    ).eval()


def ids():
    return torch.randint(3, 61, (2, 7), generator=torch.Generator().manual_seed(5))


def set_head(model):
    model.lm_head = nn.Linear(24, 61, bias=False)


def set_block(model):
    model.model.layers[1] = llama().model.layers[1]


def resize(model):
    model.resize_token_embeddings(70, mean_resizing=False)


def tie_head(model):
    model.lm_head.weight = model.model.embed_tokens.weight


def tie_embedding(model):
    model.model.embed_tokens.weight = model.lm_head.weight


def tie_by_data(model):
    model.lm_head.weight.data = model.model.embed_tokens.weight.data


def set_directly(model):
    model._modules["lm_head"] = nn.Linear(24, 61, bias=False)


def set_embedding(model):
    model.model.embed_tokens = nn.Embedding(61, 24)


HEAD, EMBEDDING = {"targets": ["lm_head"]}, {"targets": ["embed_tokens"]}
TRAINED = {"targets": ["q_proj"], "modules_to_save": ["lm_head"]}
ROWS = {"targets": ["q_proj"], "new_tokens": [3, 5]}
CHANGES = {
    "a trained head tied": (TRAINED, tie_head, "'lm_head.weight', which adapter 'default' trains"),
    "a new head": (HEAD, set_head, "'lm_head' (Linear) was replaced by Linear"),
    "a new head, past setattr": (HEAD, set_directly, "'lm_head' (Linear) was replaced by Linear"),
    "a new head that was trained": (TRAINED, set_head, "'lm_head' (Linear) was replaced"),
    "a head resized": (HEAD, resize, "'lm_head'"),
    "an embedding resized": (EMBEDDING, resize, "'model.embed_tokens' has a weight of [24, 70]"),
    "a block taken out": ({}, set_block, "'model.layers.1.self_attn.q_proj' (Linear) was replaced"),
    "a head with new rows": (ROWS, set_head, "'lm_head' (Linear) was replaced by Linear"),
    "an embedding with new rows": (ROWS, set_embedding, "'model.embed_tokens' (Embedding) was"),
    "new rows resized": (ROWS, resize, "'model.embed_tokens' has a weight of [24, 70]"),
    "a head with new rows tied": (
        {"targets": ["q_proj"], "new_tokens": {"lm_head": [3]}},
        tie_head,
        "'lm_head.weight' and 'model.embed_tokens.weight' have shared",
    ),
    "two tables of new rows tied": (ROWS, tie_head, "have shared one weight since"),
    "a head tied": (HEAD, tie_head, "'lm_head.weight' and 'model.embed_tokens.weight' have shared"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_layer_that_changed_after_attach_is_named_everywhere(change, tmp_path):
    given, act, text = CHANGES[change]
    model = llama()
    adapter = weft.attach(model, weft.LoRA(r=2, **given))
    move(adapter)
    model(ids())
    before = weft.snapshot(model)
    act(model)
    for error, call in (
        (weft.WeftError, lambda: model(ids())),
        (weft.WeftError, lambda: model(ids())),  # again
        (weft.CheckpointError, lambda: weft.save(model, tmp_path / "a")),
        (weft.MergeError, lambda: weft.merge(model)),
        (weft.AuditError, lambda: weft.audit(model, before, weft.snapshot(model))),
    ):
        if error is weft.AuditError and change == "a trained head tied":
            continue  # the snapshot puts the trained copy back in its place
        with pytest.raises(error) as caught:
            call()
        assert text in str(caught.value)
        assert error is weft.AuditError or "before weft.attach" in str(caught.value)
    assert not (tmp_path / "a").exists()
    weft.detach(model)
    assert torch.isfinite(model(ids()).logits).all()


@pytest.mark.parametrize("act", [tie_embedding, tie_by_data])
def test_a_weight_tied_from_the_other_side_is_noticed_at_save_and_merge(act, tmp_path):
    """The adapter still does what it did, so forwards go on."""
    model = llama()
    move(weft.attach(model, weft.LoRA(r=2, **HEAD)))
    weight = model.lm_head.weight.clone()
    act(model)
    weight = model.lm_head.weight.clone()
    for error, call in (
        (weft.MergeError, lambda: weft.merge(model, verify=ids())),
        (weft.CheckpointError, lambda: weft.save(model, tmp_path)),
    ):
        with pytest.raises(error, match="have shared one weight since adapter 'default'"):
            call()
    assert same_bits(model.lm_head.weight, weight)


@pytest.mark.parametrize("method", PROMPTS)
def test_a_prompt_s_place_is_watched_too(method):
    a = awake(method)
    a.run()
    a.model.body = copy.deepcopy(a.model.body)
    with pytest.raises(weft.WeftError, match="was replaced"):
        a.run()


def test_a_layer_that_is_put_back_works_again():
    a = awake("DoRA")
    before, old = a.run(), a.model.mid
    a.model.mid = nn.Linear(11, 9)
    with pytest.raises(weft.WeftError, match=r"'mid' \(Linear\) was replaced"):
        a.run()
    a.model.mid = old
    assert same_bits(a.run(), before)


def test_a_second_adapter_does_not_hide_what_the_first_has_lost():
    a = awake("LoRA")
    a.model.mid = nn.Linear(11, 9)
    weft.attach(a.model, config("LoRA", targets=["head"]), name="b")
    with pytest.raises(weft.WeftError, match=r"'mid'.*adapter 'default'"):
        a.run()
    weft.detach(a.model, "default")
    a.run()


def test_wrappers_and_changes_elsewhere_are_let_through(tmp_path):
    a = awake("DoRA")
    before = a.run()
    a.model.layer = torch.compile(a.model.layer, backend="eager")
    a.model.head = copy.deepcopy(a.model.head)
    a.model.extra = nn.Linear(2, 2).requires_grad_(False)
    a.model.mid.weight = nn.Parameter(a.model.mid.weight.detach().clone(), requires_grad=False)
    torch.testing.assert_close(a.run(), before)
    weft.save(a.model, tmp_path)
    weft.merge(a.model, verify=a.x)


def test_adapters_that_train_the_same_base_tensors_take_turns():
    a = awake("Full")
    weft.attach(a.model, config("Head"), name="head")
    for name in ("default", "head", "default", None):
        weft.use(a.model, name)
        a.run()
    weft.use(a.model, "default")
    a.model.head.weight = nn.Parameter(torch.zeros(5, 9))
    for error, call in (
        (weft.WeftError, a.run),
        (weft.MergeError, lambda: weft.merge(a.model, "default")),
    ):
        with pytest.raises(error, match=r"'head\.weight'.*was replaced by another tensor"):
            call()


def test_a_copy_watches_itself():
    a = awake("LoRA")
    a.run()
    for other in (copy.deepcopy(a.model), pickle.loads(pickle.dumps(a.model))):  # noqa: S301
        other(a.x)
        other.mid = nn.Linear(11, 9)
        with pytest.raises(weft.WeftError, match="'mid'"):
            other(a.x)
    a.run()


def test_what_trains_beside_the_adapter_is_warned_of_at_save(tmp_path):
    a = awake("LoRA")
    weft.save(a.model, tmp_path)
    a.model.head = nn.Linear(9, 5)
    with pytest.warns(UserWarning, match=r"'head.weight' and 1 more may train.*modules_to_save"):
        weft.save(a.model, tmp_path)
    before = weft.snapshot(a.model)
    a.model.tail = nn.Linear(9, 5)
    with pytest.raises(
        weft.AuditError, match=r"tail\.weight: not in the model at the first snapshot"
    ):
        weft.audit(a.model, before, weft.snapshot(a.model))


def test_attach_drops_the_gradients_of_the_base():
    """An optimiser that still has the base would apply them to frozen weights."""
    model = net()
    optimiser = torch.optim.SGD(model.parameters(), lr=1.0)
    model(inputs("linear")).sum().backward()
    adapter = weft.attach(model, config("LoRA"))
    before = model.head.weight.clone()
    model(inputs("linear")).sum().backward()
    optimiser.step()
    assert same_bits(model.head.weight, before)
    assert all(p.grad is not None for p in adapter.parameters())


def tied_llama():
    return llama(tie_word_embeddings=True)


def untie(model):
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())


def test_a_table_of_new_rows_that_was_tied_and_is_not_any_more_is_named(tmp_path):
    """Merging would write the rows into one of the two."""
    model = tied_llama()
    move(weft.attach(model, weft.LoRA(r=2, **ROWS)))
    model(ids())
    untie(model)
    for error, call in (
        (weft.WeftError, lambda: model(ids())),
        (weft.MergeError, lambda: weft.merge(model)),
        (weft.CheckpointError, lambda: weft.save(model, tmp_path / "a")),
    ):
        with pytest.raises(error, match="were one weight when adapter 'default' was attached"):
            call()
    model.lm_head.weight = model.model.embed_tokens.weight
    weft.merge(model, verify=ids())


def test_torch_func_may_put_tables_of_new_rows_in_for_a_call():
    model = tied_llama()
    move(weft.attach(model, weft.LoRA(r=2, **ROWS)))
    wanted = model(ids()).logits
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    found = torch.func.functional_call(model, weights, (ids(),))
    torch.testing.assert_close(found.logits, wanted)
    assert same_bits(model(ids()).logits, wanted)


def test_each_reader_of_a_trained_tied_tensor_is_watched(tmp_path):
    given = {"targets": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    model = tied_llama()
    move(weft.attach(model, weft.LoRA(r=2, **given)))
    model(ids())
    set_head(model)  # the second of the two
    for error, call in (
        (weft.WeftError, lambda: model(ids())),
        (weft.CheckpointError, lambda: weft.save(model, tmp_path / "a")),
    ):
        with pytest.raises(error, match=r"'lm_head' \(Linear\) was replaced by Linear"):
            call()


def test_a_weight_tied_to_a_trained_copy_is_named(tmp_path):
    """It would keep the copy when another adapter, or the base, is active."""
    model = llama()
    weft.attach(model, weft.LoRA(r=2, targets=["q_proj"], modules_to_save=["embed_tokens"]))
    before = model.model.embed_tokens.weight.clone()
    move(weft.adapters(model)["default"])
    tie_head(model)
    for error, call in (
        (weft.MergeError, lambda: weft.merge(model)),
        (weft.CheckpointError, lambda: weft.save(model, tmp_path / "a")),
    ):
        with pytest.raises(error, match=r"'lm_head\.weight' have shared one weight since"):
            call()
    with pytest.raises(weft.WeftError, match=r"'lm_head\.weight' has shared one weight with"):
        weft.use(model, None)
    model(ids())
    weft.detach(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert same_bits(model.lm_head.weight, before)


class Twice(nn.Module):
    """One table under two names, as in an encoder-decoder."""

    def __init__(self):
        super().__init__()
        self.shared, self.mid = nn.Linear(7, 7), nn.Linear(7, 7)
        self.other = self.shared

    def forward(self, x):
        return self.other(torch.tanh(self.mid(self.shared(x))))


@pytest.mark.parametrize(
    "given", [{"targets": ["shared"]}, {"targets": ["mid"], "modules_to_save": ["shared"]}]
)
@pytest.mark.parametrize("second", [False, True])
def test_a_module_with_two_names_is_watched_under_both(given, second, tmp_path):
    model, x = Twice(), torch.randn(3, 7)
    move(weft.attach(model, weft.LoRA(r=2, **given)))
    model(x)
    model.other = nn.Linear(7, 7)
    if second:
        weft.attach(model, weft.LoRA(r=2, targets=["mid"]), name="second")
    for error, call in (
        (weft.WeftError, lambda: model(x)),
        (weft.CheckpointError, lambda: weft.save(model, tmp_path)),
    ):
        with pytest.raises(error, match=r"'other' \(Linear\) was replaced by Linear"):
            call()
    model.other = model.shared
    model(x)


def test_a_prompt_that_lost_its_place_is_no_fault_of_another_adapter(tmp_path):
    a = awake("PreEmbed")
    weft.attach(a.model, config("LoRA", targets=["head"]), name="b")
    a.model.body = copy.deepcopy(a.model.body).requires_grad_(False)
    weft.save(a.model, tmp_path / "b", name="b")
    with pytest.raises(weft.CheckpointError, match=r"virtual tokens of adapter 'default'"):
        weft.save(a.model, tmp_path / "a")


def test_a_second_adapter_does_not_hide_that_a_whole_part_is_gone():
    model = llama()
    move(weft.attach(model, weft.LoRA(r=2, targets=["q_proj"])))
    model.model.layers = model.model.layers[:1]
    weft.attach(model, weft.LoRA(r=2, targets=["lm_head"]), name="b")
    with pytest.raises(weft.WeftError, match=r"'model\.layers\.1\.self_attn\.q_proj' \(Linear\)"):
        model(ids())


def test_weights_that_share_memory_are_tied_at_attach():
    model = llama()
    tie_by_data(model)
    with pytest.raises(weft.TargetError, match="are tied"):
        weft.attach(model, weft.LoRA(r=2, **HEAD))
