"""`train=`: tensors of the base that train beside an adapter, counted by hand, saved, merged,
switched off and audited like the adapter's own.
"""

import json
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import nn

import weft
from architectures import ARCHITECTURES
from support import distance, move, same_bits
from weft.methods import from_json, to_json

# gpt2: 3 blocks of width 24, an MLP of 96, the head tied to the embedding [61, 24].
# bert: 3 post-norm blocks of width 24, an MLP of 44, a pooler and a classifier [2, 24].
COUNTS = {
    "gpt2": {
        # ln_1, ln_2, c_attn, attn.c_proj, c_fc, mlp.c_proj | ln_f
        "biases": 3 * (24 + 24 + 72 + 24 + 96 + 24) + 24,
        "norms": 3 * 2 * 48 + 48,
        "last:1": 2 * 48 + (24 * 72 + 72) + (24 * 24 + 24) + (24 * 96 + 96) + (96 * 24 + 24) + 48,
        "target-biases": 3 * (72 + 24),
        "ln_f": 48,
        "ln_1.weight": 3 * 24,
        "h.1.mlp.c_fc": 24 * 96 + 96,
        "wpe": 32 * 24,
    },
    "bert": {
        # embeddings' norm | q k v, attention output, its norm, intermediate, output, its norm | pooler
        "biases": 24 + 3 * (3 * 24 + 24 + 24 + 44 + 24 + 24) + 24,
        "norms": 48 + 3 * 2 * 48,
        "head": 24 * 2 + 2,
        "last:1": 4 * (24 * 24 + 24) + 48 + (24 * 44 + 44) + (44 * 24 + 24) + 48,
        "target-biases": 3 * (24 + 24),
        "pooler": 24 * 24 + 24,
        "output.LayerNorm": 3 * 2 * 48,
    },
}
# The layers that the counts of "target-biases" are for, and that no word above trains in full but
# those of FULL.
TARGETS = {"gpt2": ["c_attn", "attn.c_proj"], "bert": ["query", "value"]}
FULL = {"last:1"}
METHODS = {
    "LoRA": lambda targets: weft.LoRA(r=2, targets=targets),
    "DoRA": lambda targets: weft.DoRA(r=2, targets=targets),
    "VeRA": lambda targets: weft.VeRA(r=3, targets=targets),
    "DVoRA": lambda targets: weft.DVoRA(r=3, targets=targets),
    "LoRAFA": lambda targets: weft.LoRAFA(r=2, targets=targets),
    "AdaLoRA": lambda targets: weft.AdaLoRA(r=2, targets=targets, total_steps=40),
    "Bottleneck": lambda targets: weft.Bottleneck(r=2, targets=targets),
    "Prefix": lambda targets: weft.Prefix(n=2),
    "PreEmbed": lambda targets: weft.PreEmbed(l_p=2),
    "Head": lambda targets: weft.Head(),
    "BitFit": lambda targets: weft.BitFit(),
}
CASES = [
    pytest.param(model, method, word, id=f"{model}-{method}-{word}")
    for model, words in COUNTS.items()
    for method in ("LoRA", "DoRA", "VeRA", "BitFit")
    for word in words
    if not (method == "BitFit" and word == "target-biases")
]
PAIRS = [
    pytest.param(model, method, id=f"{model}-{method}")
    for model in COUNTS
    for method in METHODS
    if (model, method) != ("gpt2", "Head")
]


def config(model, method, *words):
    return replace(METHODS[method](TARGETS[model]), train=words)


def attached(model, method, *words, name="default", seed=2):
    """A model with a moved adapter."""
    built = ARCHITECTURES[model].build()
    adapter = weft.attach(built, config(model, method, *words), name=name)
    move(adapter, seed)
    return built, adapter


@cache
def given(model):
    return ARCHITECTURES[model].inputs()


@torch.no_grad()
def logits(model, name):
    return model(**given(name)).logits.clone()


@pytest.mark.parametrize(("model", "method", "word"), CASES)
def test_a_word_adds_the_tensors_counted_by_hand(model, method, word):
    alone = weft.attach(ARCHITECTURES[model].build(), METHODS[method](TARGETS[model]))
    built = ARCHITECTURES[model].build()
    if word in FULL and method != "BitFit":
        with pytest.raises(weft.TargetError, match=r"named by targets and by .*train=\['last:1'\]"):
            weft.attach(built, config(model, method, word))
        return
    adapter = weft.attach(built, config(model, method, word))
    sizes = {n: p.numel() for n, p in adapter.selected.items()}
    new = sum(size for n, size in sizes.items() if n not in alone.selected)
    # BitFit trains the biases already.
    of_word = _of_word(model, word) if alone.selected else ()
    both = sum(p.numel() for n, p in alone.selected.items() if n in of_word)
    assert new == COUNTS[model][word] - both and alone.selected.keys() <= sizes.keys()
    assert adapter.num_parameters == alone.num_parameters + new


def _of_word(model, word):
    """The tensors of a word, from an adapter that trains nothing else of the base."""
    return set(weft.attach(ARCHITECTURES[model].build(), weft.Prefix(n=2, train=[word])).selected)


@pytest.mark.parametrize(("model", "method"), PAIRS)
def test_the_plan_lists_each_selected_tensor(model, method):
    built, adapter = attached(model, method, "biases", "norms")
    plan = adapter.plan()
    listed = {row.name: row.trainable for row in plan.rows}
    assert {n: p.numel() for n, p in adapter.selected.items()}.items() <= listed.items()
    assert plan.trainable == adapter.num_parameters
    assert {n for n, _ in adapter.named_parameters()} >= adapter.selected.keys()
    weft.detach(built)
    assert plan.base_parameters == sum(p.numel() for p in built.parameters())


@pytest.mark.parametrize(("model", "method"), PAIRS)
def test_switching_off_and_detaching_give_the_base_bit_for_bit(model, method):
    clean = ARCHITECTURES[model].build()
    base, bits = logits(clean, model), {n: t.clone() for n, t in clean.state_dict().items()}
    built, _ = attached(model, method, "biases", "norms")
    moved = logits(built, model)
    assert distance(moved, base) > 1e-3
    with weft.use(built, None):
        assert same_bits(logits(built, model), base)
    assert same_bits(logits(built, model), moved)
    flags = {n: p.requires_grad for n, p in clean.named_parameters()}
    weft.detach(built)
    assert same_bits(logits(built, model), base)
    assert all(same_bits(t, bits[n]) for n, t in built.state_dict().items())
    assert {n: p.requires_grad for n, p in built.named_parameters()} == flags


@pytest.mark.parametrize(("model", "method"), PAIRS)
def test_saved_and_loaded_it_is_the_same_bit_for_bit(model, method, tmp_path):
    built, adapter = attached(model, method, "biases", "norms")
    wanted = logits(built, model)
    weft.save(built, tmp_path)
    again = ARCHITECTURES[model].build()
    loaded = weft.load(again, tmp_path)
    assert loaded.config.train == ("biases", "norms")
    assert same_bits(logits(again, model), wanted)
    before, after = dict(adapter.named_parameters()), dict(loaded.named_parameters())
    assert before.keys() == after.keys()
    assert all(same_bits(before[n], after[n]) for n in before)


@pytest.mark.parametrize(("model", "method"), PAIRS)
def test_merging_is_verified_and_undone_bit_for_bit(model, method):
    built, adapter = attached(model, method, "biases", "norms")
    if not adapter.config.mergeable:
        with pytest.raises(weft.UnsupportedError):
            weft.merge(built)
        return
    with weft.use(built, None):
        base = logits(built, model)
    report = weft.merge(built, verify=given(model))
    assert report.output_error < 1e-4 < report.effect
    assert report.weights == len(adapter.sites) + len(adapter.selected)
    weft.unmerge(built)
    with weft.use(built, None):
        assert same_bits(logits(built, model), base)


def train(model, parameters, name, steps=3):
    optimiser = torch.optim.AdamW(list(parameters), lr=1e-2, weight_decay=0.0)
    model.train()
    for _ in range(steps):
        optimiser.zero_grad()
        model(**given(name)).logits.sub(1).pow(2).mean().backward()
        optimiser.step()
    model.eval()


@pytest.mark.parametrize(("model", "method"), PAIRS)
def test_the_audit_passes_after_a_training_and_names_a_tensor_that_did_not_move(model, method):
    built = ARCHITECTURES[model].build()
    words = ("target-biases", "norms") if hasattr(config(model, method), "targets") else ("norms",)
    adapter = weft.attach(built, config(model, method, *words))
    before = weft.snapshot(built)
    train(built, adapter.parameters(), model)
    weft.audit(built, before, weft.snapshot(built))
    for name in (*list(adapter.selected)[:1], *list(adapter.selected)[-1:]):
        before = weft.snapshot(built)
        rest = [p for n, p in adapter.named_parameters() if n != name]
        train(built, rest, model)
        with pytest.raises(weft.AuditError) as caught:
            weft.audit(built, before, weft.snapshot(built))
        assert str(caught.value).splitlines()[1:] == [
            (
                f"  {name}: it has a gradient but did not move (is it in the optimiser, and is the "
                "learning rate above 0?)"
            )
        ]


@pytest.mark.parametrize("method", ["LoRA", "DoRA", "VeRA", "DVoRA"])
@pytest.mark.parametrize("model", list(COUNTS))
def test_gradients_of_biases_are_those_of_the_effective_model(model, method):
    """The gradient of each selected tensor is that of the base model with W' in W's place."""
    built, adapter = attached(model, method, "biases", "norms")
    built(**given(model)).logits.sub(1).pow(2).mean().backward()
    found = {name: p.grad for name, p in adapter.selected.items()}
    plain, _ = attached(model, method, "biases", "norms")
    weft.merge(plain)
    weft.detach(plain, keep_merged=True)
    for p in plain.parameters():
        p.requires_grad_(True)
    plain(**given(model)).logits.sub(1).pow(2).mean().backward()
    largest = max(float(grad.abs().max()) for grad in found.values())
    for name, grad in found.items():
        wanted = plain.get_parameter(name).grad
        # Attention does not depend on the bias of its keys: that gradient is rounding alone.
        noise = float(wanted.abs().max()) < 1e-5 * largest
        assert float(grad.abs().max()) < 1e-5 * largest if noise else distance(grad, wanted) < 2e-3


def test_two_adapters_have_copies_of_their_own():
    built, _ = attached("gpt2", "LoRA", "biases", name="a")
    second = weft.attach(built, config("gpt2", "DoRA", "norms", "target-biases"), name="b")
    move(second, 3)
    alone = {
        "a": attached("gpt2", "LoRA", "biases")[0],
        "b": attached("gpt2", "DoRA", "norms", "target-biases", seed=3)[0],
    }
    for name in ("a", "b", "a"):
        with weft.use(built, name):
            assert same_bits(logits(built, "gpt2"), logits(alone[name], "gpt2"))
    with pytest.raises(weft.UnsupportedError, match="trains base tensors"):
        weft.use(built, ["a", None])
    weft.detach(built, "a")
    with weft.use(built, "b"):
        assert same_bits(logits(built, "gpt2"), logits(alone["b"], "gpt2"))


def test_a_tensor_that_is_selected_twice_trains_once():
    words = ("biases", "norms", "last:1", "ln_f", "ln_f.bias", "h.2")
    adapter = weft.attach(
        ARCHITECTURES["gpt2"].build(), weft.BitFit(train=words, modules_to_save=["ln_f"])
    )
    trained = list(adapter.parameters())
    assert len({id(p) for p in trained}) == len(trained) == len(adapter.selected)
    counts = COUNTS["gpt2"]
    block = counts["last:1"] - 48
    rest = (counts["biases"] - 24) * 2 // 3 + 2 * 2 * 24 + 48  # of the two blocks below, and ln_f
    assert adapter.num_parameters == block + rest
    assert list(adapter.selected) == [
        n for n, _ in adapter.model.named_parameters() if n in adapter.selected
    ]


def test_a_bottleneck_may_train_the_norm_that_it_stands_behind():
    built = ARCHITECTURES["bert"].build()
    adapter = weft.attach(built, weft.Bottleneck(r=2, targets="block-output", train=["norms"]))
    assert set(adapter.sites) <= {n.rpartition(".")[0] for n in adapter.selected}


def test_an_adapted_layer_that_would_train_in_full_is_named_with_the_word():
    for word in ("all", "last:1", "c_attn", "h.2.attn.c_attn.weight"):
        with pytest.raises(weft.TargetError) as caught:
            weft.attach(
                ARCHITECTURES["gpt2"].build(), weft.LoRA(r=2, targets=["c_attn"], train=[word])
            )
        assert "c_attn' is named by targets" in str(caught.value)
        assert f"LoRA(train=[{word!r}])" in str(caught.value)
    adapter = weft.attach(
        ARCHITECTURES["gpt2"].build(),
        weft.LoRA(r=2, targets=["c_attn"], train=["c_attn.bias", "mlp"]),
    )
    assert "transformer.h.0.attn.c_attn.bias" in adapter.selected


def test_a_failed_attach_leaves_the_model_as_it_was():
    built = ARCHITECTURES["gpt2"].build()
    with pytest.raises(weft.TargetError):
        weft.attach(built, weft.LoRA(r=2, train=["biases", "no_such_thing"]))
    assert not weft.adapters(built) and all(p.requires_grad for p in built.parameters())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: weft.LoRA(train=["target-bias"]), r"Nearest: \['target-biases'"),
        (lambda: weft.LoRA(train=["last-2"]), r"Nearest: \['last:2'"),
        (lambda: weft.LoRA(train=["last:0"]), r"Nearest: \['last:2'"),
        (lambda: weft.LoRA(train=["last:x"]), r"Nearest: \['last:2'"),
        (lambda: weft.LoRA(train=[""]), "neither a known word"),
        (lambda: weft.LoRA(train=[3]), "write a list of"),
        (lambda: weft.LoRA(train=7), "write a list of"),
        (lambda: weft.Prefix(train=["target-biases"]), r"Prefix adapts no layers.*biases"),
        (lambda: weft.Head(train=["target-biases"]), r"Head adapts no layers"),
        (lambda: weft.LoRA(targets={"c_fc": {"train": ["norms"]}}), None),
    ],
)
def test_a_word_that_cannot_be_right_is_refused_with_the_nearest(make, message):
    if message is None:  # a field of the whole adapter
        with pytest.raises(weft.ConfigError, match="no field 'train' to override per layer"):
            weft.attach(ARCHITECTURES["gpt2"].build(), make())
        return
    with pytest.raises(weft.ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    ("model", "method", "word", "message"),
    [
        ("llama", "LoRA", "biases", r"LoRA\(train=\['biases'\]\) selects none .*no bias vectors"),
        ("llama", "LoRA", "target-biases", r"none of the \d+ adapted layers has a bias"),
        ("gpt2", "LoRA", "head", "a head tied to the embedding is not one"),
        ("gpt2", "BitFit", "last:4", r"BitFit\(train=\['last:4'\]\): the model has 3 blocks"),
        ("gpt2", "LoRA", "biasess", r"ending of no module or tensor.* Nearest: \['biases'"),
        ("gpt2", "LoRA", "ln_g", r"Nearest: .*'ln_f'"),
        ("gpt2", "LoRA", "lm_head", r"LoRA\(train=\['lm_head'\]\): 'lm_head.weight' is tied to"),
    ],
)
def test_a_word_that_selects_nothing_names_the_cure(model, method, word, message):
    make = weft.LoRA(r=2, targets="attention") if method == "LoRA" else weft.BitFit()
    with pytest.raises(weft.TargetError, match=message):
        weft.attach(ARCHITECTURES[model].build(), replace(make, train=(word,)))


def test_no_norm_to_train():
    net = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3))
    with pytest.raises(weft.TargetError, match=r"no layer norm or RMS norm .* out of train"):
        weft.attach(net, weft.LoRA(r=2, train=["norms"]))


def test_both_names_of_a_tied_tensor_train_it_once():
    adapter = weft.attach(
        ARCHITECTURES["gpt2"].build(), weft.LoRA(r=2, targets="mlp", train=["lm_head", "wte"])
    )
    assert list(adapter.selected) == ["transformer.wte.weight"]
    assert len(adapter.selected_tensors["transformer.wte.weight"].holders) == 2


def test_json_and_files_without_the_field():
    made = weft.LoRA(r=2, train=["biases", "last:1", "biases"])
    assert made.train == ("biases", "last:1") and from_json(to_json(made)) == made
    assert json.loads(json.dumps(to_json(made)))["train"] == ["biases", "last:1"]
    assert weft.LoRA(train="norms").train == ("norms",)
    assert "train" not in to_json(weft.LoRA(r=2)), "older versions must read what does not use it"
    assert from_json({"method": "BitFit"}) == weft.BitFit()
