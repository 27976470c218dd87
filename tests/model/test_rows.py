"""One adapter per row of the batch: each row is what its own adapter alone gives, in any order."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import weft
from support import (
    KINDS,
    RULE_VARIANTS,
    RULES,
    SELECTIONS,
    awake,
    check_close,
    config,
    distance,
    inputs,
    move,
    net,
    same_bits,
)


def crowded(kind="linear", variants=RULE_VARIANTS, **changes):
    """One model with an adapter of every method, each of another rank, scale and seed."""
    model = net(kind)
    for i, variant in enumerate(variants):
        awake(
            variant, kind, name=f"a{i}", model=model, r=2 + i, alpha=3.0 + 2 * i, seed=i, **changes
        )
    weft.use(model, None)
    return model, [f"a{i}" for i in range(len(variants))]


def alone(model, x, names):
    """Row by row, each with its own adapter, in a batch of its own."""
    rows = []
    for i, name in enumerate(names):
        with weft.use(model, name):
            rows.append(model(x[i : i + 1]))
    return torch.cat(rows)


@pytest.mark.parametrize("kind", KINDS)
def test_every_row_is_its_own_adapters_whatever_the_order(kind):
    model, names = crowded(kind)
    row = inputs(kind, rows=1)
    single = {name: alone(model, row, [name]) for name in [None, *names]}
    outputs = list(single.values())
    for i, one in enumerate(outputs):
        for other in outputs[:i]:
            assert distance(one, other) > 1e-2, "two adapters that do the same test nothing"
    shuffler = random.Random(5)
    for _ in range(6):
        asked = [None, *names, None, *shuffler.sample(names, 3)]
        shuffler.shuffle(asked)
        x = row.expand(len(asked), *row.shape[1:]).contiguous()
        with weft.use(model, asked):
            found = model(x)
        for i, name in enumerate(asked):
            check_close(found[i : i + 1], single[name], torch.float32, f"row {i} under {name}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", RULE_VARIANTS)
def test_two_adapters_of_one_method_with_other_ranks_and_a_base_row(variant, kind):
    model, names = crowded(kind, [variant, variant])
    asked = [names[1], None, names[0], names[1], names[0]]
    x = inputs(kind, rows=5)
    with weft.use(model, asked):
        check_close(model(x), alone(model, x, asked), torch.float32)


@given(st.data())
def test_any_layout_of_rows_gives_each_row_its_own(data):
    kind = data.draw(st.sampled_from(KINDS))
    chosen = data.draw(st.lists(st.sampled_from(RULE_VARIANTS), min_size=2, max_size=4))
    model, names = crowded(kind, chosen)
    asked = data.draw(st.lists(st.sampled_from([None, *names]), min_size=1, max_size=9))
    x = inputs(kind, rows=len(asked), seed=data.draw(st.integers(0, 99)))
    if kind == "linear" and data.draw(st.booleans()):  # Conv1D itself takes contiguous input only
        x = (
            x.transpose(1, 2).contiguous().transpose(1, 2)
        )  # the same numbers in another order of memory
    with torch.no_grad():
        wanted = alone(model, x, asked)
        with weft.use(model, asked):
            check_close(model(x), wanted, torch.float32)


def test_rows_of_the_base_are_the_bases_to_the_bit():
    model, names = crowded()
    x = inputs("linear", rows=4)
    with weft.use(model, None):
        base = model(x)
    with weft.use(model, [None] * 4):
        assert same_bits(model(x), base)
    with weft.use(model, [None, names[0], None, names[1]]):
        mixed = model(x)
    check_close(mixed[0::2], base[0::2], torch.float32)


def test_each_adapter_gets_the_gradient_of_its_own_rows():
    model, _ = crowded()
    x, asked = inputs("linear", rows=6), ["a0", "a3", None, "a3", "a0", "a1"]
    adapters = weft.adapters(model)

    def gradients(run):
        for adapter in adapters.values():
            for p in adapter.parameters():
                p.grad = None
        run().pow(2).sum().backward()
        return {f"{n}/{k}": p.grad for n, a in adapters.items() for k, p in a.named_parameters()}

    with weft.use(model, asked):
        mixed = gradients(lambda: model(x))
    separate = gradients(lambda: alone(model, x, asked))
    for key, wanted in separate.items():
        assert (mixed[key] is None) == (wanted is None) == (key.split("/")[0] not in asked), key
        if wanted is not None:
            check_close(mixed[key], wanted, torch.float32, key)


def test_rows_of_a_model_in_bfloat16():
    model, names = crowded(variants=RULES)
    model.to(torch.bfloat16)
    asked = [*names, None]
    x = inputs("linear", rows=len(asked), dtype=torch.bfloat16)
    with weft.use(model, asked):
        check_close(model(x), alone(model, x, asked), torch.bfloat16)


def test_one_name_for_all_rows_is_the_adapter():
    model, names = crowded()
    x = inputs("linear", rows=3)
    with weft.use(model, [names[2]] * 3):
        check_close(model(x), alone(model, x, [names[2]] * 3), torch.float32)


class Flattens(nn.Module):
    """Folds batch and tokens into one dimension, as mixtures of experts do."""

    def __init__(self):
        super().__init__()
        self.layer, self.mid, self.head = nn.Linear(7, 11), nn.Linear(11, 9), nn.Linear(9, 5)

    def forward(self, x):
        flat = torch.tanh(self.layer(x)).reshape(-1, 11)
        return self.head(torch.tanh(self.mid(flat))).reshape(*x.shape[:2], 5)


def test_batch_and_tokens_folded_into_one_dimension():
    model = Flattens()
    for i, variant in enumerate(RULES):
        move(weft.attach(model, config(variant, r=2 + i), name=f"a{i}"), seed=i)
    asked = [f"a{i}" for i in range(len(RULES))] + [None]
    x = inputs("linear", rows=len(asked))
    with weft.use(model, asked):
        check_close(model(x), alone(model, x, asked), torch.float32)


class Positions(nn.Module):
    """Looks up positions, which are the same for all rows, in a table."""

    def __init__(self, batched):
        super().__init__()
        self.batched, self.layer, self.head = batched, nn.Embedding(6, 7), nn.Linear(7, 5)

    def forward(self, x):
        positions = torch.arange(x.shape[1])
        return self.head(x + self.layer(positions[None] if self.batched else positions))


@pytest.mark.parametrize("batched", [False, True])
def test_an_input_whose_first_dimension_is_no_row_is_refused_rather_than_mixed_up(batched):
    model = Positions(batched)
    move(weft.attach(model, config("LoRA", targets=["layer"])))
    for rows in (2, 3, 4):
        with (
            weft.use(model, ["default", None, None, "default"][:rows]),
            pytest.raises(weft.WeftError, match="first dimension is not these rows"),
        ):
            model(inputs("linear", rows=rows))


@pytest.mark.parametrize(
    "layer", [lambda: nn.TransformerEncoderLayer(7, 1, 9), lambda: nn.LSTM(7, 7)]
)
def test_a_model_with_the_batch_in_its_second_dimension_is_refused(layer):
    model = nn.ModuleDict({"first": layer(), "layer": nn.Linear(7, 7)})
    weft.attach(model, config("LoRA", targets=["layer"]))
    with pytest.raises(weft.UnsupportedError, match=r"'first.*batch_first=False"):
        weft.use(model, ["default", None])
    weft.use(model, "default")


@pytest.mark.parametrize("gradients", [False, True])
def test_an_encoder_of_torch_with_the_batch_first(gradients):
    layer = nn.TransformerEncoderLayer(6, 2, 10, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    for i, variant in enumerate(RULES):
        move(weft.attach(model, config(variant, r=2 + i, targets="mlp"), name=f"a{i}"), seed=i)
    asked, x = ["a3", None, "a0", "a1", "a2"], torch.randn(5, 4, 6)
    with torch.set_grad_enabled(gradients):
        with weft.use(model, asked):
            mixed = model(x)
        check_close(mixed, alone(model, x, asked), torch.float32)
        assert distance(mixed[0:1], alone(model, x[0:1], [None])) > 1e-2


def test_another_number_of_rows_than_names_fails_before_the_first_layer():
    model, names = crowded()
    model.layer.register_forward_pre_hook(lambda *_: pytest.fail("a layer ran"))
    with (
        weft.use(model, names[:3]),
        pytest.raises(weft.WeftError, match=r"given 3 names.*the batch has 4 rows"),
    ):
        model(inputs("linear", rows=4))


def test_the_check_goes_when_the_rows_go():
    model, names = crowded()
    with weft.use(model, names[:3]):
        pass
    model(inputs("linear", rows=4))
    weft.use(model, names[:3])
    weft.use(model, names[:2])
    with pytest.raises(weft.WeftError, match="given 2 names"):
        model(inputs("linear", rows=3))
    for name in names:
        weft.detach(model, name)
    model(inputs("linear", rows=4))
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("name", SELECTIONS)
def test_an_adapter_that_trains_base_tensors_cannot_be_one_row_of_many(name):
    a = awake("LoRA")
    weft.attach(a.model, config(name), name="whole")
    with pytest.raises(
        weft.UnsupportedError,
        match=r"'whole' trains base tensors .* Run its rows in a batch of their own",
    ):
        weft.use(a.model, ["default", "whole", None, None])


def test_an_adapter_with_a_head_of_its_own_cannot_be_one_row_of_many():
    model = net()
    weft.attach(model, config("LoRA", modules_to_save=["head"]))
    with pytest.raises(
        weft.UnsupportedError, match=r"trains base tensors \('head\.weight', \.\.\.\)"
    ):
        weft.use(model, ["default", None])


def test_routed_experts_cannot_be_one_row_of_many():
    class Mixture(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(7, 3, bias=False)
            self.experts = nn.ModuleList(nn.Linear(7, 5) for _ in range(3))

    model = Mixture()
    adapter = weft.attach(model, config("LoRA", targets=["experts.0", "experts.1"]))
    assert adapter.routed == ["experts.0", "experts.1"]
    with pytest.raises(
        weft.UnsupportedError, match=r"adapts 'experts\.0', where a router has regrouped the tokens"
    ):
        weft.use(model, ["default", None])


def test_an_empty_batch_and_a_single_row():
    a = awake("DoRA")
    for x in (a.x[:0], a.x[:1], a.x[:, :0]):
        assert a.model(x).shape == (*x.shape[:2], 5)
    with weft.use(a.model, [None]):
        assert a.model(a.x[:1]).shape == (1, 6, 5)
    with weft.use(a.model, ["default", None, "default", None]):
        assert a.model(a.x[:, :0]).shape == (4, 0, 5)
