"""Virtual tokens and prefixes in models of transformers: padding, caches, generation, rows, and
what is refused.
"""

import copy
import inspect
import pickle
from functools import cache, partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import weft
from architectures import ARCHITECTURES, SMALL
from support import check_close, distance, move, same_bits

DECODERS = ("gpt2", "llama", "opt", "qwen3")
ENCODERS = ("bert", "roberta", "vit")
CONFIGS = {
    "Prefix": weft.Prefix(n=3, seed=7),
    "Prefix:kept": weft.Prefix(n=3, positions="kept", seed=7),
    "Prefix:hidden": weft.Prefix(n=3, hidden=5, seed=7),
    "PreEmbed": weft.PreEmbed(l_p=2, l_i=2, seed=7),
    "PreEmbed:before": weft.PreEmbed(l_p=3, seed=7),
    "PreLayer": weft.PreLayer(l_p=2, l_i=2, seed=7),
    "PreLayer:behind": weft.PreLayer(l_p=0, l_i=2, seed=7),
}
each_config = pytest.mark.parametrize("method", CONFIGS)
MAIN = (
    "Prefix",
    "PreEmbed",
    "PreLayer",
)  # for architectures that are here for their attention or their positions alone
ON_DECODERS = [
    (name, method)
    for name in DECODERS
    for method in CONFIGS
    if name in ("gpt2", "llama") or method in MAIN
]
on_decoders = pytest.mark.parametrize(("name", "method"), ON_DECODERS)
on_all = pytest.mark.parametrize(
    ("name", "method"),
    [
        *ON_DECODERS,
        *((name, method) for name in ENCODERS for method in MAIN),
        ("t5", "Prefix"),
        ("t5", "Prefix:hidden"),
    ],
)
F64 = torch.float64
CACHE = (
    "cache"
    if "cache" in inspect.signature(type(ARCHITECTURES["llama"].build()).forward).parameters
    else "past_key_values"
)  # its name before transformers 5.2x


@cache
def built(name):
    return ARCHITECTURES[name].build().to(F64)


def attached(name, method, eager=False):
    """A model in float64 with a moved adapter."""
    model = copy.deepcopy(built(name))
    if eager:
        model.set_attn_implementation("eager")
    adapter = weft.attach(model, CONFIGS[method])
    move(adapter)
    return model, adapter


def ids(rows=3, length=7, seed=0):
    return torch.randint(
        3, SMALL["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(seed)
    )


def padded(rows, side):
    """Rows of other lengths in one batch: ids, mask, and position ids that count real tokens."""
    longest = max(len(row) for row in rows)
    batch, mask = (
        torch.zeros(len(rows), longest, dtype=torch.long),
        torch.zeros(len(rows), longest, dtype=torch.long),
    )
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
        batch[i, place], mask[i, place] = row, 1
    return {
        "input_ids": batch,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
    }


@on_decoders
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_real_token_of_a_decoder(name, method, side):
    model, _ = attached(name, method)
    rows = [ids(1, n, seed=n)[0] for n in (7, 4, 5)]
    with torch.no_grad():
        batch = padded(rows, side)
        found = model(**batch).logits
        assert found.shape[:2] == batch["input_ids"].shape
        for i, row in enumerate(rows):
            check_close(
                found[i][batch["attention_mask"][i].bool()],
                model(row[None]).logits[0],
                F64,
                f"row {i}",
            )


@pytest.mark.parametrize("method", MAIN)
@pytest.mark.parametrize(
    ("name", "side"), [("bert", "right"), ("roberta", "right"), ("roberta", "left")]
)
def test_padding_changes_no_logits_of_an_encoder(name, method, side):
    """As far as the model itself allows: BERT gives left padding other positions, and reads the
    first column.
    """
    if side == "left":
        import transformers

        base = (
            transformers.RobertaForMaskedLM(ARCHITECTURES["roberta"].build().config).eval().to(F64)
        )
        move(weft.attach(base, CONFIGS[method]))
        rows = [ids(1, n, seed=n)[0] for n in (7, 4)]
        batch = padded(rows, "left")
        found = base(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        check_close(found[1, 3:], base(rows[1][None]).logits[0], F64)
        return
    model, _ = attached(name, method)
    rows = [ids(1, n, seed=n)[0] for n in (7, 4, 5)]
    batch = padded(rows, side)
    found = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    for i, row in enumerate(rows):
        check_close(found[i], model(row[None]).logits[0], F64, f"row {i}")


@on_all
def test_rows_of_a_batch_are_independent_and_eager_is_sdpa(name, method):
    model, _ = attached(name, method)
    other, _ = attached(name, method, eager=True)
    inputs = ARCHITECTURES[name].inputs(3)
    inputs = {k: v.to(F64) if v.is_floating_point() else v for k, v in inputs.items()}
    with torch.no_grad():
        whole = model(**inputs).logits
        check_close(
            other(**inputs).logits, whole, torch.float32
        )  # eager has its softmax in float32, whatever the model
        for i in range(3):
            check_close(
                model(**{k: v[i : i + 1] for k, v in inputs.items()}).logits, whole[i : i + 1], F64
            )
        with weft.use(model, None):
            assert distance(model(**inputs).logits, whole) > 1e-2


@on_decoders
def test_generating_with_a_cache_is_generating_without_step_by_step(name, method):
    model, _ = attached(name, method)
    batch = padded([ids(1, n, seed=n)[0] for n in (5, 3)], "left")
    batch.pop("position_ids")
    settings = {
        "max_new_tokens": 5,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
        "eos_token_id": None,
    }
    with_cache = model.generate(**batch, use_cache=True, **settings)
    without = model.generate(**batch, use_cache=False, **settings)
    assert torch.equal(with_cache.sequences, without.sequences)
    for one, other in zip(with_cache.logits, without.logits, strict=True):
        check_close(one, other, F64)
    single = model.generate(
        batch["input_ids"][1:, 2:], use_cache=True, **settings
    )  # the shorter row, unpadded and alone
    assert torch.equal(single.sequences[0, 3:], with_cache.sequences[1, 5:])
    with weft.use(model, None):
        base = model.generate(**batch, use_cache=True, **settings)
    assert distance(base.logits[0], with_cache.logits[0]) > 1e-2


@each_config
@pytest.mark.parametrize("name", ["llama"])
def test_beams_with_a_cache_are_beams_without(name, method):
    model, _ = attached(name, method)
    batch = padded([ids(1, n, seed=n)[0] for n in (5, 3)], "left")
    batch.pop("position_ids")
    settings = {"max_new_tokens": 4, "do_sample": False, "num_beams": 3, "eos_token_id": None}
    assert torch.equal(
        model.generate(**batch, use_cache=True, **settings),
        model.generate(**batch, use_cache=False, **settings),
    )


@each_config
def test_a_loop_of_ones_own_with_a_cache(method):
    model, _ = attached("llama", method)
    x = ids(2, 6)
    with torch.no_grad():
        out = model(x[:, :4], use_cache=True)
        for step in (4, 5):
            mask = torch.ones(2, step + 1, dtype=torch.long)
            out = model(
                x[:, step : step + 1], attention_mask=mask, use_cache=True, **{CACHE: out[CACHE]}
            )
        wanted = (
            model(x).logits[:, -1:]
            if CONFIGS[method].where == "attention" or not CONFIGS[method].l_i
            else None
        )
        if wanted is None:  # behind the prompt of four, and labels say where it ends
            labels = x.clone()
            labels[:, :4] = -100
            wanted = model(x, labels=labels).logits[:, -1:]
        check_close(out.logits, wanted, F64)


@pytest.mark.parametrize("method", ["PreEmbed", "PreLayer", "PreLayer:behind"])
def test_labels_say_where_the_prompt_ends_and_the_loss_is_that_of_the_logits(method):
    model, adapter = attached("gpt2", method)
    x, labels = ids(2, 7), ids(2, 7)
    labels[0, :3], labels[1, :5] = -100, -100
    out = model(x, labels=labels)
    loss = nn.functional.cross_entropy(
        out.logits[:, :-1].reshape(-1, 61), labels[:, 1:].reshape(-1)
    )
    check_close(out.loss, loss, torch.float32)
    alone = [model(x[i : i + 1], labels=labels[i : i + 1]).logits for i in range(2)]
    check_close(out.logits, torch.cat(alone), F64)
    cut = model(x[:1, :3]).logits[:, -1]  # the prompt alone: what comes next is what the batch says
    check_close(out.logits[:1, 2], cut, F64)
    after = [p for key, p in adapter.named_parameters() if key.endswith("after")]
    assert (
        torch.autograd.grad(out.logits[0, 2].sum(), after, retain_graph=True)[-1].abs().max() > 0
    ), "it is what answers"
    out.loss.backward()
    assert all(p.grad.abs().max() > 0 for p in adapter.parameters())


def test_what_a_cache_was_filled_with_cannot_be_continued_with_something_else():
    model, _ = attached("llama", "PreEmbed")
    x = ids(2, 5)
    with torch.no_grad():
        cache = model(x, use_cache=True)[CACHE]
        with (
            weft.use(model, None),
            pytest.raises(weft.WeftError, match="filled under 'default', and now None is active"),
        ):
            model(x[:, :1], **{CACHE: cache})
        with pytest.raises(weft.UnsupportedError, match="one token at a time"):
            model(x[:, :2], **{CACHE: cache})
        with weft.use(model, None):
            cache = model(x, use_cache=True)[CACHE]
        with pytest.raises(
            weft.WeftError, match="filled under 'no virtual tokens', and now 'default' is active"
        ):
            model(x[:, :1], **{CACHE: cache})


@pytest.mark.parametrize(
    ("name", "method"),
    [
        *(("gpt2", method) for method in CONFIGS),
        *((name, method) for name in ("llama", "bert", "vit") for method in MAIN),
    ],
)
def test_detach_gives_the_model_back(name, method):
    model = ARCHITECTURES[name].build()
    inputs = ARCHITECTURES[name].inputs()
    before, keys, implementation = (
        model(**inputs).logits,
        list(model.state_dict()),
        model.config._attn_implementation,
    )
    hooks = [
        (len(m._forward_hooks), len(m._forward_pre_hooks), sorted(m.__dict__))
        for m in model.modules()
    ]
    move(weft.attach(model, CONFIGS[method]))
    move(weft.attach(model, CONFIGS[method], name="b"))
    weft.detach(model)
    with weft.use(model, "b"):
        assert distance(model(**inputs).logits, before) > 1e-3
    weft.detach(model, "b")
    assert same_bits(model(**inputs).logits, before) and list(model.state_dict()) == keys
    assert model.config._attn_implementation == implementation
    assert hooks == [
        (len(m._forward_hooks), len(m._forward_pre_hooks), sorted(m.__dict__))
        for m in model.modules()
    ]


@pytest.mark.parametrize("method", MAIN)
@pytest.mark.parametrize("name", ["gpt2", "vit"])
def test_copies_and_pickles_stand_alone(name, method):
    model, _ = attached(name, method)
    inputs = {
        k: v.to(F64) if v.is_floating_point() else v
        for k, v in ARCHITECTURES[name].inputs().items()
    }
    wanted = model(**inputs).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
        assert same_bits(twin(**inputs).logits, wanted)
        move(weft.adapters(twin)["default"], seed=5)
        assert distance(twin(**inputs).logits, wanted) > 1e-2
        weft.detach(twin)
        assert same_bits(model(**inputs).logits, wanted)


@pytest.mark.parametrize("method", [*MAIN, "Prefix:hidden"])
@pytest.mark.parametrize(
    ("name", "reentrant"),
    [("gpt2", False), ("llama", True), ("llama", False), ("bert", True), ("vit", False)],
)
def test_gradient_checkpointing_gives_the_same_gradients(name, method, reentrant):
    model, adapter = attached(name, method)
    inputs = {
        k: v.to(F64) if v.is_floating_point() else v
        for k, v in ARCHITECTURES[name].inputs().items()
    }
    if name in DECODERS:
        inputs["labels"] = inputs["input_ids"].masked_fill(torch.arange(7) < 3, -100)
    model.train()

    def gradients():
        out = model(**inputs)
        (out.loss if name in DECODERS else out.logits.pow(2).sum()).backward()
        found = [p.grad for p in adapter.parameters()]
        for p in adapter.parameters():
            p.grad = None
        return found

    wanted = gradients()
    if reentrant:
        model.enable_input_require_grads()
    enable = (
        getattr(model, "activation_checkpointing_enable", None)
        or model.gradient_checkpointing_enable
    )
    enable({"use_reentrant": reentrant})
    for one, other in zip(gradients(), wanted, strict=True):
        check_close(one, other, F64)


class Recomputed(nn.Module):
    """A block that backward runs again, hooks and all, as transformers before 5.24 have it."""

    def __init__(self, inner, reentrant):
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x, **kwargs):
        return checkpoint(partial(self.inner, **kwargs), x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", MAIN)
def test_a_block_that_is_recomputed_alone_finds_its_virtual_tokens(method, reentrant):
    model, adapter = attached("llama", method)
    batches = [
        (x, x.masked_fill(torch.arange(x.shape[1]) < 4, -100)) for x in (ids(2, 7), ids(2, 5))
    ]

    def gradients():
        losses = [model(x, labels=labels, use_cache=False).loss for x, labels in batches]
        sum(weight * loss for weight, loss in zip((1, 3), losses, strict=True)).backward()
        found = [p.grad for p in adapter.parameters()]
        for p in adapter.parameters():
            p.grad = None
        return found

    wanted = gradients()
    model.enable_input_require_grads()
    for i, block in enumerate(model.model.layers):
        model.model.layers[i] = Recomputed(block, reentrant)
    for one, other in zip(gradients(), wanted, strict=True):
        check_close(one, other, F64)


def test_prefixes_of_other_lengths_and_the_base_in_one_batch():
    for name in ("gpt2", "llama", "bert", "t5"):
        model = ARCHITECTURES[name].build().to(F64)
        for adapter, config in (
            ("a", weft.Prefix(n=2, seed=1)),
            ("b", weft.Prefix(n=4, seed=2)),
            ("c", weft.Prefix(n=3, seed=3, positions="kept")),
            ("lora", weft.LoRA(r=2, seed=4)),
        ):
            move(weft.attach(model, config, name=adapter), seed=config.seed)
        asked = ["a", None, "b", "lora", "c", "a"]
        inputs = ARCHITECTURES[name].inputs(len(asked))
        if name in DECODERS:
            inputs["attention_mask"] = torch.ones(6, 7, dtype=torch.long).index_put(
                (torch.tensor([0, 2, 2]), torch.tensor([0, 0, 1])), torch.tensor(0)
            )
        with torch.no_grad():
            with weft.use(model, asked):
                mixed = model(**inputs).logits
            for i, adapter in enumerate(asked):
                with weft.use(model, adapter):
                    alone = model(**{k: v[i : i + 1] for k, v in inputs.items()}).logits
                keep = inputs["attention_mask"][i].bool() if "attention_mask" in inputs else ...
                check_close(
                    mixed[i : i + 1, keep] if keep is not ... else mixed[i : i + 1],
                    alone[:, keep] if keep is not ... else alone,
                    F64,
                    f"{name} row {i} under {adapter}",
                )


@pytest.mark.parametrize("method", ["PreEmbed", "PreLayer"])
def test_virtual_tokens_cannot_be_one_row_of_many(method):
    model, _ = attached("gpt2", method)
    with pytest.raises(
        weft.UnsupportedError,
        match="adds tokens to the input, and all rows of a batch have one length",
    ):
        weft.use(model, ["default", None])


def test_an_attention_that_was_changed_under_a_prefix_is_an_error():
    model, _ = attached("gpt2", "Prefix")
    model.set_attn_implementation("eager")
    with pytest.raises(
        weft.WeftError, match="set to 'eager' after an adapter with keys and values was attached"
    ):
        model(ids())
    with weft.use(model, None):
        model(ids())
    weft.detach(model)
    assert model.config._attn_implementation == "eager"


@each_config
def test_a_model_without_a_place_for_it_is_refused_before_anything_changes(method):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    for model in (
        nn.TransformerEncoder(layer, 2),
        nn.Sequential(nn.Linear(7, 11), nn.Linear(11, 5)),
    ):
        before = [(n, p.requires_grad) for n, p in model.named_parameters()]
        needed = (
            "goes through AttentionInterface"
            if method.startswith("Prefix")
            else "takes inputs_embeds"
        )
        with pytest.raises(weft.TargetError, match=needed):
            weft.attach(model, CONFIGS[method])
        assert before == [
            (n, p.requires_grad) for n, p in model.named_parameters()
        ] and not weft.adapters(model)


def test_what_virtual_tokens_do_not_go_with_says_so():
    t5 = ARCHITECTURES["t5"].build()
    with pytest.raises(weft.TargetError, match=r"encoder-decoder.*weft\.Prefix"):
        weft.attach(t5, weft.PreEmbed())
    model, _ = attached("gpt2", "PreEmbed")
    with pytest.raises(weft.UnsupportedError, match="token_type_ids"):
        model(ids(), token_type_ids=ids())
    with pytest.raises(weft.UnsupportedError, match="as \\[rows, tokens\\]"):
        model(ids(), attention_mask=torch.ones(3, 1, 7, 7))
    with pytest.raises(weft.UnsupportedError, match="packs several sequences into it"):
        model(ids(), position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3]]))
    for method in ("Prefix", "PreEmbed"):
        full, _ = attached("gpt2", method)
        full(ids(1, 28))
        with pytest.raises(weft.UnsupportedError, match="and the model has learned 32"):
            full(ids(1, 30))
    import transformers

    with torch.device("meta"):
        modern = transformers.ModernBertModel(
            transformers.ModernBertConfig(
                vocab_size=61,
                hidden_size=24,
                num_hidden_layers=1,
                num_attention_heads=3,
                pad_token_id=0,
            )
        )
    with pytest.raises(
        weft.TargetError, match=r"gives its blocks 'position_embeddings'.*weft\.Prefix"
    ):
        weft.attach(modern, weft.PreEmbed())
    flex = ARCHITECTURES["llama"].build()
    flex.config._attn_implementation = "flex_attention"
    with pytest.raises(weft.TargetError, match=r"its attention is 'flex_attention'"):
        weft.attach(flex, weft.Prefix())


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_hidden_states_hold_real_tokens_only(name):
    for method in ("PreEmbed", "PreLayer"):
        model, _ = attached(name, method)
        out = model(ids(), output_hidden_states=True)
        assert {tuple(h.shape) for h in out.hidden_states} == {(3, 7, 24)}
        plain = model(ids(), output_hidden_states=True, return_dict=False)
        assert same_bits(plain[0], out.logits)


def test_a_head_beside_it_and_a_classifier_on_the_last_token():
    import transformers

    config = ARCHITECTURES["gpt2"].build().config
    model = transformers.GPT2ForSequenceClassification(config).eval().to(F64)
    adapter = weft.attach(model, weft.PreEmbed(l_p=2, l_i=2, modules_to_save=["score"]))
    move(adapter)
    assert adapter.num_head_parameters == 48
    rows = [ids(1, n, seed=n)[0] for n in (7, 4)]
    batch = padded(rows, "right")
    found = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        labels=torch.tensor([0, 1]),
    ).logits
    check_close(found, torch.cat([model(row[None]).logits for row in rows]), F64)
