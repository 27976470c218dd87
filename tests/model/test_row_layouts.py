"""Rows of a mixed batch in models whose layers do not have the batch in front: exact, or refused by
name, and never a guess from a shape.
"""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from torch import nn

import weft
from support import check_close, distance

NAMES = ["a", None, "b", "a"]


def awake(model, targets="all-linear"):
    """The model in float64 with two LoRAs that are not at their start."""
    torch.manual_seed(0)
    for i, name in enumerate("ab"):
        adapter = weft.attach(model, weft.LoRA(r=2 + i, targets=targets, seed=i), name=name)
        with torch.no_grad():
            for p in adapter.parameters():
                p.add_(0.5 * torch.randn_like(p))
    return model.double().eval()


def output(found):
    for key in ("logits", "last_hidden_state"):
        if hasattr(found, key):
            return getattr(found, key)
    return found


@torch.no_grad()
def check_exact(model, names, given, alone):
    """Each row is what its adapter gives for `alone(row)`, which is not what the base gives."""
    with weft.use(model, names):
        mixed = output(model(**given))
    for i, name in enumerate(names):
        with weft.use(model, name):
            own = output(model(**alone(i)))[0]
        check_close(mixed[i], own, torch.float64, f"row {i} under {name}")
        with weft.use(model, None):
            base = output(model(**alone(i)))[0]
        assert (distance(own, base) > 1e-3) == (name is not None)


def rows_of(**given):
    """Row i of inputs that have one row per row of the batch."""
    return lambda i: {key: t[i : i + 1] for key, t in given.items()}


class Block(nn.Module):
    """Two layers, and an embedding for models of ids."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.table = nn.Embedding(9, 6)
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 5)

    def layers(self, x):
        return self.second(torch.tanh(self.first(x)))


class TimeMajor(Block):
    """Flattens [tokens x batch]."""

    def forward(self, x):
        flat = x.transpose(0, 1).reshape(-1, 6)
        return self.layers(flat).view(x.shape[1], x.shape[0], 5).transpose(0, 1)


class SequenceFirst(Block):
    """Works on [tokens, batch, width], and mixes the tokens."""

    def forward(self, x):
        h = self.first(x.transpose(0, 1))
        scores = torch.einsum("tbd,sbd->bts", h, h).softmax(-1)
        return self.second(torch.einsum("bts,sbd->tbd", scores, h)).transpose(0, 1)


class Windows(Block):
    """Splits each row into windows, which become the batch of the layers."""

    def forward(self, x):
        return self.layers(x.reshape(-1, 2, 6)).reshape(x.shape[0], -1, 5)


@pytest.mark.parametrize("cls", [TimeMajor, SequenceFirst, Windows])
def test_layers_with_the_rows_elsewhere_are_exact_for_any_length(cls):
    model = awake(cls())
    for rows, tokens in ((4, 4), (4, 6), (2, 2), (3, 4), (2, 6)):
        x = torch.randn(rows, tokens, 6, dtype=torch.float64)
        check_exact(model, NAMES[:rows], {"x": x}, rows_of(x=x))


def test_a_call_with_one_token_tells_nothing_of_longer_ones():
    model = awake(TimeMajor())
    for tokens in (1, 4, 1):
        x = torch.randn(4, tokens, 6, dtype=torch.float64)
        check_exact(model, NAMES, {"x": x}, rows_of(x=x))


def test_gradients_of_rows_that_are_elsewhere():
    model = awake(TimeMajor())
    x = torch.randn(4, 4, 6, dtype=torch.float64)
    parameters = [p for a in weft.adapters(model).values() for p in a.parameters()]
    with weft.use(model, NAMES):
        mixed = torch.autograd.grad(model(x).pow(2).sum(), parameters)
    loss = x.new_zeros(())
    for i, name in enumerate(NAMES):
        with weft.use(model, name):
            loss = loss + model(x[i : i + 1]).pow(2).sum()
    for ours, own in zip(mixed, torch.autograd.grad(loss, parameters), strict=True):
        check_close(ours, own, torch.float64)


class Packed(Block):
    """Drops padding, so rows have as many positions as tokens."""

    def forward(self, x, mask):
        out = x.new_zeros(*x.shape[:2], 5)
        out[mask] = self.layers(x[mask])
        return out


class PackedByIds(Block):
    """The same by the padding's id, 0."""

    def forward(self, ids):
        out = self.table.weight.new_zeros(*ids.shape, 5)
        out[ids > 0] = self.layers(self.table(ids[ids > 0]))
        return out


class Sorted(Block):
    """Orders the rows by their length."""

    def forward(self, x, lengths):
        order = lengths.argsort(descending=True, stable=True)
        return self.layers(x[order])[order.argsort()]


class Reversed(Block):
    """Turns the batch around."""

    def forward(self, x):
        return self.layers(x.flip(0)).flip(0)


class Indexed(Block):
    """Adds images to the rows that an input names."""

    def forward(self, ids, images, row):
        own = self.second(torch.tanh(self.first(images)))
        return self.table(ids).mean(1)[:, :5].index_add(0, row, own)


class Mixing(Block):
    """Takes the mean over the batch."""

    def forward(self, x):
        return self.layers(x - x.mean(0, keepdim=True))


def numbers(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


REFUSED = {
    Packed: {"x": numbers(2, 4, 6), "mask": torch.ones(2, 4, dtype=torch.bool)},
    PackedByIds: {"ids": torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])},
    Sorted: {"x": numbers(2, 4, 6), "lengths": torch.tensor([4, 4])},
    Reversed: {"x": numbers(3, 4, 6)},
    Indexed: {
        "ids": torch.tensor([[1, 2], [3, 4]]),
        "images": numbers(2, 6),
        "row": torch.tensor([0, 1]),
    },
    Mixing: {"x": numbers(2, 4, 6)},
}


@pytest.mark.parametrize("cls", REFUSED)
def test_what_only_looks_like_rows_is_refused_by_name(cls):
    model, given = awake(cls()), REFUSED[cls]
    names = ["a", "b", None][: len(next(iter(given.values())))]
    with weft.use(model, names), torch.no_grad():
        for _ in range(2):
            with pytest.raises(weft.UnsupportedError, match=r"'first' .*batch of their own"):
                model(**given)
    with weft.use(model, ["a"] * len(names)):
        mixed = model(**given)
    with weft.use(model, "a"):
        assert torch.equal(model(**given), mixed), "rows with one adapter need no layout"


def test_a_batch_with_equal_rows_is_no_obstacle():
    model, x = awake(SequenceFirst()), torch.randn(1, 4, 6, dtype=torch.float64).expand(4, 4, 6)
    check_exact(model, NAMES, {"x": x}, rows_of(x=x))


class Stateful(nn.Module):
    """Changes itself, the generator and its input in a forward."""

    def __init__(self):
        super().__init__()
        self.layer, self.drop, self.norm = nn.Linear(6, 8), nn.Dropout(0.5), nn.BatchNorm1d(8)
        self.register_buffer("last", torch.zeros(6))
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        self.last.copy_(x.detach().mean(0))
        y = self.norm(self.layer(self.drop(x)))
        x += 1
        return y


def test_finding_the_rows_leaves_no_trace():
    model = awake(Stateful()).train()
    x = torch.randn(4, 6, dtype=torch.float64)
    before, state = x.clone(), {k: t.clone() for k, t in model.state_dict().items()}
    with weft.use(model, ["a", "b", "b", None]):
        torch.manual_seed(5)
        first = model(x.clone())
        assert (model.calls, int(model.norm.num_batches_tracked)) == (1, 1)
        assert model.training and model.norm.training and model.drop.training
        model.load_state_dict(state)
        torch.manual_seed(5)
        torch.testing.assert_close(model(x), first, rtol=0, atol=0)  # without a probe
    assert torch.equal(x, before + 1) and model.calls == 2


def test_a_copy_finds_the_rows_again_and_a_new_adapter_too():
    import copy

    model = awake(SequenceFirst())
    x = torch.randn(4, 4, 6, dtype=torch.float64)
    check_exact(model, NAMES, {"x": x}, rows_of(x=x))
    twin = copy.deepcopy(model)
    check_exact(twin, NAMES, {"x": x}, rows_of(x=x))
    weft.detach(model, "b")
    awake_again = weft.attach(model, weft.LoRA(r=3, targets=["second"]), name="b")
    with torch.no_grad():
        for p in awake_again.parameters():
            p.add_(0.5)
    check_exact(model, NAMES, {"x": x}, rows_of(x=x))
    for name in ("a", "b"):
        weft.detach(model, name)
    assert not any("_weft" in key for m in model.modules() for key in m.__dict__)


TINY = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.3,
}
TEXT = TINY | {"num_key_value_heads": 2, "vocab_size": 60, "max_position_embeddings": 64}
IN_TEXT = r".*(language_model|text_model).*(q_proj|down_proj)"


def longformer():
    config = tf.LongformerConfig(
        **TINY, vocab_size=50, attention_window=[4, 4], max_position_embeddings=64
    )
    return awake(tf.LongformerModel(config))


def test_longformer_with_as_many_tokens_as_rows():
    model = longformer()
    for tokens in (4, 8):
        ids = torch.randint(3, 50, (4, tokens))
        check_exact(model, ["a", "b", "a", "b"], {"input_ids": ids}, rows_of(input_ids=ids))
        seen = torch.zeros_like(ids)
        seen[:, 0] = 1
        given = {"input_ids": ids, "global_attention_mask": seen}
        check_exact(model, NAMES, given, rows_of(**given))


def test_xlnet_is_sequence_first_inside():
    config = tf.XLNetConfig(
        d_model=16, n_layer=2, n_head=2, d_inner=32, vocab_size=50, initializer_range=0.3
    )
    model, ids = awake(tf.XLNetModel(config)), torch.randint(3, 50, (4, 4))
    check_exact(model, NAMES, {"input_ids": ids}, rows_of(input_ids=ids))


def llava(targets):
    vision = tf.CLIPVisionConfig(**TINY, image_size=8, patch_size=4)
    config = tf.LlavaConfig(
        vision_config=vision,
        text_config=tf.LlamaConfig(**TEXT),
        image_token_index=50,
        image_token_id=50,
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
    )
    return awake(tf.LlavaForConditionalGeneration(config), targets)


def smolvlm(targets):
    config = tf.SmolVLMConfig(
        vision_config=TINY | {"image_size": 8, "patch_size": 2},
        text_config=TEXT | {"model_type": "llama"},
        image_token_id=50,
        scale_factor=2,
        pad_token_id=0,
    )
    return awake(tf.SmolVLMForConditionalGeneration(config), targets)


def qwen_vl(targets, third=False):
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2}
    vision |= {"patch_size": 4, "temporal_patch_size": 1, "spatial_merge_size": 2}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    text = TEXT | {"rope_parameters": rope, "bos_token_id": 1, "eos_token_id": 2}
    ids = {"image_token_id": 50, "vision_start_token_id": 51, "vision_end_token_id": 52}
    ids |= {"video_token_id": 53, "bos_token_id": 1, "eos_token_id": 2}
    if third:
        vision |= {"out_hidden_size": 16, "num_position_embeddings": 16}
        vision |= {"deepstack_visual_indexes": [0]}
        config = tf.Qwen3VLConfig(vision_config=vision, text_config=text | {"head_dim": 8}, **ids)
        return awake(tf.Qwen3VLForConditionalGeneration(config), targets)
    vision |= {"out_hidden_size": 16, "window_size": 16, "fullatt_block_indexes": [1]}
    config = tf.Qwen2_5_VLConfig(vision_config=vision, text_config=text, **ids)
    return awake(tf.Qwen2_5_VLForConditionalGeneration(config), targets)


def uneven_llava():
    image = [50] * 4
    ids = torch.tensor([[3, *image, 5, *image], list(range(3, 13))])
    images = numbers(2, 3, 8, 8)
    alone = [{"input_ids": ids[:1], "pixel_values": images}, {"input_ids": ids[1:]}]
    return {"input_ids": ids, "pixel_values": images}, alone


def uneven_smolvlm():
    image = [50] * 4
    ids = torch.tensor([[3, *image, 5, *image], list(range(3, 13))])
    images = numbers(2, 2, 3, 8, 8)
    images[1] = 0  # padding: this row has no image
    alone = [{"input_ids": ids[:1], "pixel_values": images[:1]}, {"input_ids": ids[1:]}]
    return {"input_ids": ids, "pixel_values": images}, alone


def uneven_qwen_vl():
    ids = torch.tensor([[3, 51, 50, 50, 50, 50, 52, 7], [3, 51, 50, 50, 52, 6, 8, 9]])
    grid, patches = torch.tensor([[1, 4, 4], [1, 2, 4]]), numbers(24, 48)
    kinds = (ids == 50).int()
    given = {"input_ids": ids, "pixel_values": patches, "image_grid_thw": grid}
    given["mm_token_type_ids"] = kinds
    alone = [
        {
            "input_ids": ids[i : i + 1],
            "pixel_values": patches[part],
            "image_grid_thw": grid[i : i + 1],
            "mm_token_type_ids": kinds[i : i + 1],
        }
        for i, part in enumerate((slice(16), slice(16, 24)))
    ]
    return given, alone


VISION = {
    "LLaVA": (llava, uneven_llava),
    "SmolVLM": (smolvlm, uneven_smolvlm),
    "Qwen2.5-VL": (qwen_vl, uneven_qwen_vl),
    "Qwen3-VL": (lambda targets: qwen_vl(targets, third=True), uneven_qwen_vl),
}


@pytest.mark.parametrize("name", VISION)
def test_images_that_are_not_one_to_a_row(name):
    build, inputs = VISION[name]
    given, alone = inputs()
    for names in (["a", "b"], ["a", None]):
        check_exact(build(IN_TEXT), names, given, lambda i: alone[i])
    model = build("all-linear")
    with (
        weft.use(model, ["a", "b"]),
        pytest.raises(weft.UnsupportedError, match=r"'model\.vis.*batch of their own"),
    ):
        model(**given)
    text = {"input_ids": torch.tensor([[3, 4, 5], [6, 7, 8]])}
    check_exact(model, ["a", "b"], text, rows_of(**text))


def test_pairs_of_images_and_texts_are_rows():
    config = tf.BlipConfig(
        text_config=TINY
        | {"vocab_size": 50, "max_position_embeddings": 32, "encoder_hidden_size": 16},
        vision_config=TINY | {"image_size": 8, "patch_size": 4},
        projection_dim=8,
        initializer_range=0.3,
    )
    model = awake(tf.BlipForConditionalGeneration(config), r".*(query|qkv|fc1)")
    given = {"input_ids": torch.randint(3, 48, (4, 5)), "pixel_values": numbers(4, 3, 8, 8)}
    check_exact(model, NAMES, given, rows_of(**given))


def t5():
    config = tf.T5Config(
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        vocab_size=50,
        decoder_start_token_id=0,
        initializer_factor=3.0,
    )
    return awake(tf.T5ForConditionalGeneration(config))


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 2},
    ],
)
def test_encoder_decoders_generate_with_rows_and_beams(how):
    model, ids = t5(), torch.randint(3, 50, (3, 6))
    names, given = ["a", None, "b"], {"max_new_tokens": 4, "eos_token_id": None, **how}
    k = max(how.get("num_beams", 1), how.get("num_return_sequences", 1))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    with weft.use(model, [name for name in names for _ in range(k)]):
        mixed = model.generate(input_ids=ids, attention_mask=mask, **given)
    if how.get("do_sample"):
        return  # another number of draws than alone
    for i, name in enumerate(names):
        with weft.use(model, name):
            one = model.generate(input_ids=ids[i : i + 1], attention_mask=mask[i : i + 1], **given)
        assert torch.equal(mixed[i * len(one) : (i + 1) * len(one)], one), f"row {i}"


def test_beams_of_one_prompt_have_one_adapter():
    model, ids = t5(), torch.randint(3, 50, (2, 6))
    with (
        weft.use(model, ["a", "b", "a", "b"]),
        pytest.raises(weft.WeftError, match="2 beams or samples of one prompt"),
    ):
        model.generate(input_ids=ids, num_beams=2, max_new_tokens=3)


def test_decoders_generate_after_one_look(monkeypatch):
    from weft.model import row_calls

    config = tf.LlamaConfig(**TEXT, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model, looks = awake(tf.LlamaForCausalLM(config)), []
    own = row_calls.Probe
    monkeypatch.setattr(row_calls, "Probe", lambda *a: looks.append(a) or own(*a))
    ids = torch.randint(3, 50, (4, 4))
    given = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    with weft.use(model, NAMES):
        mixed = model.generate(ids, attention_mask=torch.ones_like(ids), **given)
    for i, name in enumerate(NAMES):
        with weft.use(model, name):
            mask = torch.ones_like(ids[:1])
            own_ids = model.generate(ids[i : i + 1], attention_mask=mask, **given)
            assert torch.equal(own_ids[0], mixed[i])
    assert len(looks) == 1


@pytest.mark.parametrize("first", [False, True])
def test_a_compiled_model_has_the_rows_of_the_model(first):
    torch._dynamo.reset()
    model, x = awake(TimeMajor()), torch.randn(4, 4, 6, dtype=torch.float64)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        if first:
            with weft.use(model, NAMES):
                model(x)
        with weft.use(compiled, NAMES):
            found = compiled(x)
        for i, name in enumerate(NAMES):
            with weft.use(model, name):
                check_close(found[i], model(x[i : i + 1])[0], torch.float64)


@pytest.mark.parametrize("cls", [TimeMajor, SequenceFirst])
def test_strengths_need_no_rows_and_disturb_none(cls):
    """A sum is exact wherever the rows are, before and after they are found, and inside of a part."""
    model, x = awake(cls()), torch.randn(4, 7, 6, dtype=torch.float64)
    of = {}
    for name in ("a", "b", None):
        with weft.use(model, name), torch.no_grad():
            of[name] = model(x)
    strengths = {"a": 0.5, "b": -1.5}
    combined = weft.combine(model, strengths, name="both")
    with torch.no_grad():
        wanted = model(x)
    weft.use(model, strengths)
    for _ in range(2):
        with torch.no_grad():
            check_close(model(x), wanted, torch.float64)
            with weft.use(model, [*NAMES[:3], "both"]):
                mixed = model(x)
                check_close(mixed[2], of["b"][2], torch.float64)
                check_close(mixed[3], wanted[3], torch.float64)
                with weft.use(model, strengths):
                    check_close(model(x), wanted, torch.float64)
    assert distance(wanted, of[None]) > 1e-3 and combined.is_attached
