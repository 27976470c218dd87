"""What is saved comes back bit for bit, and the size of the file is known before it is written."""

from __future__ import annotations

import copy
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoint_support import CONFIG, GPT2, TENSORS, attached, read, tiny
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import weft
from support import (
    KINDS,
    RULES,
    SAVED_AS_TRAINED,
    SELECTIONS,
    VARIANTS,
    Awake,
    Net,
    awake,
    config,
    inputs,
    move,
    net,
    same_bits,
)
from weft.model.adapter import Adapter

HELD = ("float32", "bfloat16", "float64")


def same_adapter(a: Adapter, b: Adapter) -> None:
    """The same tensors under the same names, bit for bit, of the same layers, by the same rules."""
    mine, other = dict(a.named_parameters()), dict(b.named_parameters())
    assert list(mine) == list(other)
    for name, tensor in mine.items():
        assert tensor.dtype == other[name].dtype, name
        assert same_bits(tensor, other[name]), name
    assert a.config == b.config
    assert {m: s.method for m, s in a.sites.items()} == {m: s.method for m, s in b.sites.items()}


def round_trip(a: Awake, folder: Path, model: Net | None = None, name: str = "default") -> Adapter:
    size = a.adapter.nbytes
    written = weft.save(a.model, folder, name=a.adapter.name)
    assert size == (written / TENSORS).stat().st_size
    model = (
        net(a.kind, a.model.head.weight.dtype, variant=type(a.config).__name__)
        if model is None
        else model
    )
    loaded = weft.load(model, folder, name=name)
    same_adapter(a.adapter, loaded)
    a.model.eval()
    model.eval()
    with torch.no_grad():
        assert same_bits(a.run(), model(a.x))
    return loaded


@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", SAVED_AS_TRAINED)
def test_save_then_load_restores_every_bit(variant, kind, held, tmp_path):
    dtype = torch.float64 if held == "float64" else torch.float32
    round_trip(awake(variant, kind, dtype, held=held), tmp_path)


@pytest.mark.parametrize("variant", SAVED_AS_TRAINED)
def test_save_then_load_restores_every_bit_of_a_bfloat16_model(variant, tmp_path):
    round_trip(awake(variant, dtype=torch.bfloat16, held="bfloat16"), tmp_path)


@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("variant", [v for v in VARIANTS if v not in SAVED_AS_TRAINED])
def test_what_only_made_the_tensors_is_dropped_and_the_outputs_stay(variant, held, tmp_path):
    a = awake(variant, held=held)
    weft.save(a.model, tmp_path)
    assert a.adapter.nbytes == (tmp_path / TENSORS).stat().st_size
    model = net(variant=variant)
    loaded = weft.load(model, tmp_path)
    with torch.no_grad():
        assert same_bits(model(a.x), a.run())
    assert loaded.num_parameters == weft.inspect(tmp_path).numbers < a.adapter.num_parameters
    assert loaded.config == replace(
        a.config, hidden=None, dtype="float64" if held == "float64" else "float32"
    )
    move(loaded)  # and it trains on
    model(a.x).sum().backward()
    assert all(p.grad.abs().max() > 0 for p in loaded.parameters())


@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("variant", VARIANTS)
def test_size_is_known_on_the_meta_device(variant, held, tmp_path):
    a = awake(variant, held=held)
    weft.save(a.model, tmp_path)
    with torch.device("meta"):
        model = Net("linear", body="body" in a.model._modules)
    adapter = weft.attach(model, a.config)
    assert adapter.nbytes == (tmp_path / TENSORS).stat().st_size
    with pytest.raises(weft.CheckpointError, match="meta device"):
        weft.save(model, tmp_path)


@pytest.mark.parametrize("method", [name for name in RULES if hasattr(config(name), "r")])
def test_layers_of_one_adapter_may_have_their_own_rank_and_dtype(method, tmp_path):
    more = (
        {"dropout": 0.25} if hasattr(config(method), "dropout") else {}
    )  # a method need not have it
    a = awake(
        method,
        targets={"layer": {"r": 2, "dtype": "bfloat16"}, "mid": {"dtype": "float64", **more}},
    )
    assert {p.dtype for p in a.adapter.parameters()} == {torch.bfloat16, torch.float64}
    loaded = round_trip(a, tmp_path)
    assert loaded.sites["layer"].method.r == 2
    assert all(getattr(loaded.sites["mid"].method, field) == value for field, value in more.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", RULES)
def test_a_model_that_was_cast_after_attaching_is_saved_as_it_is(method, dtype, tmp_path):
    a = awake(method)
    a.model.to(dtype)
    a.x = a.x.to(dtype)
    size = a.adapter.nbytes
    weft.save(a.model, tmp_path)
    assert size == (tmp_path / TENSORS).stat().st_size
    model = net(dtype=torch.float32).to(dtype)
    loaded = weft.load(model, tmp_path)
    for (name, mine), other in zip(a.adapter.named_parameters(), loaded.parameters(), strict=True):
        assert other.dtype == dtype, name
        assert same_bits(mine, other), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", RULES)
def test_modules_to_save_come_back(method, dtype, tmp_path):
    a = awake(method, dtype=dtype, held=str(dtype).removeprefix("torch."), modules_to_save=["head"])
    assert {"head.weight", "head.bias"} <= set(a.adapter.selected)
    loaded = round_trip(a, tmp_path)
    with weft.use(loaded.model, None):
        assert same_bits(loaded.model.head.weight.double(), a.base["head.weight"])


@pytest.mark.parametrize("method", SELECTIONS)
def test_a_selection_with_modules_to_save(method, tmp_path):
    round_trip(awake(method, modules_to_save=["mid"]), tmp_path)


@pytest.mark.parametrize("method", RULES)
def test_an_adapter_may_be_loaded_under_another_name_beside_others(method, tmp_path):
    a = awake(method)
    other = attached(
        a.model, config("DoRA", seed=9, modules_to_save=["head"]), name="second", seed=8
    )
    weft.save(a.model, tmp_path / "first", name="default")
    weft.save(a.model, tmp_path / "second", name="second")
    model = net()
    second = weft.load(model, tmp_path / "second", name="b")  # now active, head and all
    assert list(weft.adapters(model)) == ["b"]
    first = weft.load(model, tmp_path / "first", name="a")
    assert list(weft.adapters(model)) == ["b", "a"]
    same_adapter(a.adapter, first)
    same_adapter(other, second)
    with torch.no_grad():
        for mine, theirs in (("a", "default"), ("b", "second"), (None, None)):
            with weft.use(model, mine), weft.use(a.model, theirs):
                assert same_bits(model(a.x), a.run())
    weft.save(model, tmp_path / "again", name="a")
    assert (
        tmp_path / "again" / TENSORS
    ).read_bytes()  # saving beside an active other changes nothing
    same_adapter(weft.load(net(), tmp_path / "again"), a.adapter)


def test_a_name_that_is_taken_is_refused(tmp_path):
    a = awake("LoRA")
    weft.save(a.model, tmp_path)
    with pytest.raises(weft.WeftError, match="already attached"):
        weft.load(a.model, tmp_path)
    assert list(weft.adapters(a.model)) == ["default"]


def test_an_adapter_on_a_model_that_is_one_layer(tmp_path):
    x = torch.randn(3, 7)
    for method in ("LoRA", "VeRA", "DVoRA", "Full"):
        model = nn.Linear(7, 11)
        loose = copy.deepcopy(model)
        attached(model, config(method, targets=".*"))
        weft.save(model, tmp_path / method)
        weft.load(loose, tmp_path / method)
        assert same_bits(model(x), loose(x))


@pytest.mark.parametrize("method", ["VeRA", "DVoRA"])
def test_equal_matrices_exist_once_a_model_after_loading(method, tmp_path):
    a = awake(method)
    weft.save(a.model, tmp_path / "one")
    model = net()
    one, two = (weft.load(model, tmp_path / "one", name=name) for name in ("one", "two"))
    shared = {id(site.shared) for adapter in (one, two) for site in adapter.sites.values()}
    assert len(shared) == 1


def test_a_redrawn_projection_is_not_in_the_file_and_a_stored_one_is(tmp_path):
    a = awake("VeRA")
    weft.save(a.model, tmp_path / "small")
    weft.save(a.model, tmp_path / "whole", projections=True)
    assert not [k for k in read(tmp_path / "small")[0] if "vera_" in k]
    whole = read(tmp_path / "whole")[0]
    shared = a.adapter.sites["layer"].shared
    assert same_bits(whole["base_model.vera_A"], shared.A)
    assert same_bits(whole["base_model.vera_B"], shared.B)
    loaded = weft.load(net(), tmp_path / "whole")
    same_adapter(a.adapter, loaded)
    assert loaded.config.draw == "weft"
    assert loaded.nbytes == (tmp_path / "small" / TENSORS).stat().st_size


def test_stored_projections_are_whole_even_from_a_bfloat16_model(tmp_path):
    a = awake("VeRA")
    wanted = a.adapter.sites["layer"].shared.A.clone()
    a.model.bfloat16()
    weft.save(a.model, tmp_path, projections=True)
    assert same_bits(read(tmp_path)[0]["base_model.vera_A"], wanted)
    weft.load(net(dtype=torch.float32), tmp_path)


@pytest.mark.parametrize("method", ["LoRA", "DoRA", "DVoRA", "Full"])
def test_projections_are_refused_where_there_are_none(method, tmp_path):
    a = awake(method)
    with pytest.raises(weft.UnsupportedError, match=f"{method} has none"):
        weft.save(a.model, tmp_path, projections=True)
    assert not list(tmp_path.iterdir())


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        inner = {"query": nn.Linear(768, 768), "value": nn.Linear(768, 768)}
        self.attention = nn.ModuleDict({"self": nn.ModuleDict(inner)})


def roberta(layers: int) -> nn.Module:
    """Names of the length that they have in practice:
    roberta.encoder.layer.11.attention.self.query.
    """
    encoder = nn.ModuleDict({"layer": nn.ModuleList(Block() for _ in range(layers))})
    return nn.ModuleDict({"roberta": nn.ModuleDict({"encoder": encoder})})


@pytest.mark.parametrize("layers", [12, 24, 48, 96])
@pytest.mark.parametrize("method", ["VeRA", "DVoRA"])
def test_the_small_form_is_the_vectors_and_at_most_4096_bytes(method, layers, tmp_path):
    with torch.device("meta"):
        model = roberta(layers)
    adapter = weft.attach(
        model, getattr(weft, method)(r=257, targets=["query", "value"], modules_to_save=[])
    )
    vectors = sum(p.numel() * p.element_size() for p in adapter.parameters())
    assert adapter.nbytes - vectors <= 4096
    if layers == 12:
        real = roberta(layers)
        weft.attach(real, adapter.config)
        weft.save(real, tmp_path)
        assert (tmp_path / TENSORS).stat().st_size == adapter.nbytes


def test_the_small_form_stays_small_with_a_head_and_two_ranks(tmp_path):
    with torch.device("meta"):
        model = roberta(48)
        model["classifier"] = nn.Linear(768, 3)
    adapter = weft.attach(
        model,
        weft.DVoRA(
            r=257,
            targets={"query": {"r": 129, "dtype": "bfloat16"}, "value": {}},
            modules_to_save=["classifier"],
        ),
    )
    assert adapter.nbytes - sum(p.numel() * p.element_size() for p in adapter.parameters()) <= 4096


@given(st.data())
def test_any_names_shapes_ranks_and_dtypes(data):
    """Names are JSON text in the header, and its length counts: quotes, newlines and other
    alphabets among them.
    """
    number = st.integers(1, 40)
    name = st.text(
        st.characters(exclude_characters=".", exclude_categories=["Cs"]), min_size=1, max_size=9
    )
    names = data.draw(
        st.lists(
            name.filter(lambda n: not hasattr(nn.Module(), n)), min_size=1, max_size=4, unique=True
        )
    )
    shapes = [(data.draw(number), data.draw(number)) for _ in names]

    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleDict({n: nn.Linear(*shape) for n, shape in zip(names, shapes, strict=True)})

    method, held = data.draw(st.sampled_from(RULES)), data.draw(st.sampled_from(HELD))
    model = build()
    adapter = attached(model, config(method, r=data.draw(number), dtype=held, targets=["(?s:.*)"]))
    with tempfile.TemporaryDirectory() as folder:
        weft.save(model, folder)
        assert adapter.nbytes == (Path(folder) / TENSORS).stat().st_size
        same_adapter(adapter, weft.load(build(), folder))
        weft.inspect(folder)


def test_tied_tensors_are_saved_once_and_come_back_tied(tmp_path):
    model, other = (tiny("GPT2LMHeadModel", "GPT2Config", **GPT2) for _ in range(2))
    adapter = attached(model, weft.Full())
    weft.save(model, tmp_path)
    assert sum("lm_head" in key for key in read(tmp_path)[0]) == 0
    same_adapter(adapter, weft.load(other, tmp_path))
    assert other.lm_head.weight is other.transformer.wte.weight


def test_a_full_adapter_in_a_coarser_model_is_rounded_and_said_so(tmp_path):
    a = awake("Full")
    weft.save(a.model, tmp_path)
    loaded = weft.load(net(dtype=torch.bfloat16), tmp_path)
    assert same_bits(loaded.selected["head.weight"], a.adapter.selected["head.weight"].bfloat16())
    assert "rounded from float32 to bfloat16" in str(loaded.load_report)


def test_whole_numbers_among_the_parameters_are_kept(tmp_path):
    def build() -> nn.Module:
        model = net()
        model.steps = nn.Parameter(torch.tensor([3, 4]), requires_grad=False)
        return model

    model = build()
    adapter = weft.attach(model, weft.Full())
    with torch.no_grad():
        adapter.selected["steps"].add_(5)
    weft.save(model, tmp_path)
    assert weft.load(build(), tmp_path).selected["steps"].tolist() == [8, 9]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_is_not_saved_over_a_good_checkpoint(value, tmp_path):
    a = awake("LoRA")
    weft.save(a.model, tmp_path)
    before = (tmp_path / TENSORS).read_bytes()
    with torch.no_grad():
        a.adapter.sites["mid"].B[1, 1] = value
    with pytest.raises(weft.CheckpointError, match=r"'mid.B' holds NaN"):
        weft.save(a.model, tmp_path)
    assert (tmp_path / TENSORS).read_bytes() == before


def test_a_sharded_tensor_is_not_saved(tmp_path):
    a = awake("LoRA")
    a.adapter.sites["mid"].B.data = torch.empty(0)  # what ZeRO-3 leaves in a parameter
    with pytest.raises(weft.CheckpointError, match=r"'mid.B' is .*\[0\].*\[9, 3\].*gather"):
        weft.save(a.model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_saving_leaves_other_files_alone_and_writes_readable_ones(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    a = awake("DoRA")
    a.adapter.save(tmp_path / "new" / "folder")
    weft.save(a.model, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", CONFIG, TENSORS, "new"]
    assert (tmp_path / "README.md").read_text() == "mine"
    mode = (tmp_path / "README.md").stat().st_mode
    assert (tmp_path / TENSORS).stat().st_mode == (tmp_path / CONFIG).stat().st_mode == mode
    assert json.loads((tmp_path / CONFIG).read_text())["peft_type"] == "LORA"


def test_a_place_that_cannot_hold_a_checkpoint_is_named(tmp_path):
    a = awake("LoRA")
    (tmp_path / "file").write_text("x")
    with pytest.raises(weft.CheckpointError, match="is a file"):
        weft.save(a.model, tmp_path / "file")
    with pytest.raises(weft.CheckpointError, match="could not be written"):
        weft.save(a.model, tmp_path / "file" / "under")
    with pytest.raises(weft.WeftError, match=r"'defualt'.*Nearest: \['default'\]"):
        weft.save(a.model, tmp_path / "out", name="defualt")


def test_the_same_seed_gives_the_same_file(tmp_path):
    for i in range(2):
        torch.randn(i + 3)  # whatever ran before
        model = net()
        weft.attach(model, config("DVoRA"))
        weft.save(model, tmp_path / str(i))
    one, two = (read(tmp_path / str(i))[0] for i in range(2))
    assert all(same_bits(one[k], two[k]) for k in one)
    assert inputs("linear").shape == (4, 6, 7)
