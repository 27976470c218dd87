"""An adapter in another form computes the same, is read by peft and by Weft, or is refused with the
reason.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import pytest
import torch
from checkpoint_support import (
    CONFIG,
    TENSORS,
    attached,
    close,
    config_of,
    llama,
    logits,
    peft_reads,
    rewrite,
    untied_gpt2,
)

import weft
from support import KINDS, awake, config, inputs, net
from weft.checkpoint import conversions
from weft.checkpoint.formats.native import NativeFormat
from weft.cli import main
from weft.methods import METHODS, LayerConfig
from weft.methods.config import LowRankConfig
from weft.methods.projections import Projections
from weft.ops.low_rank import LowRank

TO_LORA = ["LoRA", "LoRA:rslora=True", "LoRAFA", "LoRAFA:rslora=True", "AdaLoRA", "DyLoRA", "VeRA"]


def prune(adapter, marks):
    for module, kept in marks.items():
        site = adapter.sites[module]
        site.kept.copy_(torch.tensor(kept))
        site.lam.data.masked_fill_(~site.kept[:, None], 0)


def same(directory, kind, x, wanted, tolerance=1e-5):
    """Both readers of the directory give these outputs."""
    mine = net(kind).eval()
    adapter = weft.load(mine, directory)
    close(logits(mine, x), wanted, logits(net(kind), x), tolerance)
    close(
        logits(peft_reads(net(kind), directory, "fan_in_fan_out is set to"), x),
        wanted,
        logits(net(kind), x),
        tolerance,
    )
    return adapter


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", TO_LORA)
def test_to_lora(variant, kind, tmp_path):
    a = awake(variant, kind)
    a.model.eval()
    weft.save(a.model, tmp_path / "a")
    found = weft.export(tmp_path / "a", "lora", tmp_path / "b")
    assert found.to == "LoRA" and found.error < 1e-7 and found.layers == 2
    assert found.nbytes == (tmp_path / "b" / TENSORS).stat().st_size
    adapter = same(tmp_path / "b", kind, a.x, logits(a.model, a.x))
    assert type(adapter.config) is weft.LoRA
    method = variant.partition(":")[0]
    if method in ("LoRA", "LoRAFA", "DyLoRA"):
        assert found.error == 0
        for module, site in adapter.sites.items():
            assert torch.equal(site.A, a.adapter.sites[module].A) and torch.equal(
                site.B, a.adapter.sites[module].B
            )
    weft.inspect(tmp_path / "b")
    weft.save(a.adapter.model, tmp_path / "again")  # the source is as it was


def test_adalora_keeps_the_triplets_in_force_only(tmp_path):
    a = awake("AdaLoRA")
    prune(a.adapter, {"layer": [True, False, True], "mid": [False, True, False]})
    weft.save(a.model, tmp_path / "a")
    weft.export(tmp_path / "a", "lora", tmp_path / "b")
    adapter = same(tmp_path / "b", "linear", a.x, logits(a.model, a.x))
    assert adapter.ranks == {"layer": 2, "mid": 1} == a.adapter.ranks
    prune(a.adapter, {"layer": [False] * 3})
    weft.save(a.model, tmp_path / "a")
    found = weft.export(tmp_path / "a", "lora", tmp_path / "c")
    assert "1 layers keep no triplet and are left out, 'layer' first" in str(found)
    assert list(same(tmp_path / "c", "linear", a.x, logits(a.model, a.x)).sites) == ["mid"]
    prune(a.adapter, {"mid": [False] * 3})
    weft.save(a.model, tmp_path / "a")
    with pytest.raises(weft.UnsupportedError, match="no triplet of any layer is in force"):
        weft.export(tmp_path / "a", "lora", tmp_path / "d")
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("held", ["bfloat16", "float64"])
@pytest.mark.parametrize("method", ["LoRAFA", "AdaLoRA", "DyLoRA", "VeRA"])
def test_the_dtype_is_kept_and_its_rounding_measured(method, held, tmp_path):
    a = awake(method, held=held)
    weft.save(a.model, tmp_path / "a")
    found = weft.export(tmp_path / "a", "lora", tmp_path / "b")
    rounds = method in ("AdaLoRA", "VeRA") and held == "bfloat16"
    assert found.error > 1e-4 if rounds else found.error < 1e-14
    assert {p.dtype for p in weft.load(net(), tmp_path / "b").parameters()} == {
        getattr(torch, held)
    }


@pytest.mark.parametrize("method", ["LoRA", "LoRAFA", "DyLoRA", "VeRA", "AdaLoRA", "DoRA"])
def test_to_peft_with_a_head(method, tmp_path):
    a = awake(method, modules_to_save=["head"])
    a.model.eval()
    weft.save(a.model, tmp_path / "a")
    found = weft.export(tmp_path / "a", "peft", tmp_path / "b")
    adapter = same(tmp_path / "b", "linear", a.x, logits(a.model, a.x))
    assert set(adapter.selected) == {"head.weight", "head.bias"}
    assert (
        type(adapter.config).__name__
        == {"LoRAFA": "LoRA", "DyLoRA": "LoRA"}.get(method, method)
        == found.to
    )


def test_vera_for_peft_has_its_matrices(tmp_path):
    a = awake("VeRA")
    weft.save(a.model, tmp_path / "a")
    assert weft.export(tmp_path / "a", "peft", tmp_path / "b").error == 0
    wanted = Projections(3, 11, 11, 7, "weft")
    written = config_of(tmp_path / "b")
    assert written["save_projection"] is True and written["projection_prng_key"] == 7
    from checkpoint_support import read

    assert torch.equal(read(tmp_path / "b")[0]["base_model.vera_A"], wanted.A)


def test_a_language_model_with_layers_of_their_own(tmp_path):
    model = llama()
    adapter = attached(
        model,
        weft.LoRAFA(r=4, alpha=6, targets={"all-linear": {}, "q_proj": {"r": 2, "rslora": True}}),
    )
    weft.save(model, tmp_path / "a")
    weft.export(tmp_path / "a", "peft", tmp_path / "b")
    close(logits(peft_reads(llama(), tmp_path / "b")), logits(model), logits(llama()))
    other = llama()
    assert list(weft.load(other, tmp_path / "b").sites) == list(adapter.sites)
    close(logits(other), logits(model), logits(llama()))


@pytest.mark.parametrize(
    ("method", "to", "says"),
    [
        (
            "DoRA",
            "lora",
            "DoRA cannot be exported to 'lora': its magnitudes rescale the rows of the base weight",
        ),
        ("DVoRA", "lora", "DVoRA cannot be exported to 'lora': its magnitudes"),
        ("DVoRA", "peft", "DVoRA cannot be exported to 'peft': peft has no such method"),
        (
            "Bottleneck",
            "lora",
            "Bottleneck cannot be exported to 'lora': it is no change of weights",
        ),
        ("BitFit", "lora", "BitFit trains copies of base tensors"),
        ("Full", "peft", "Full trains copies"),
    ],
)
def test_what_cannot_be_exported_says_why(method, to, says, tmp_path):
    weft.save(awake(method).model, tmp_path / "a")
    with pytest.raises(weft.UnsupportedError, match=says):
        weft.export(tmp_path / "a", to, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_arguments_that_cannot_be_meant(tmp_path):
    weft.save(awake("DyLoRA").model, tmp_path / "a")
    with pytest.raises(weft.ConfigError, match=r"to must be one of \['lora', 'peft'\]"):
        weft.export(tmp_path / "a", "onnx", tmp_path / "b")
    with pytest.raises(weft.CheckpointError, match="exists and is not empty"):
        weft.export(tmp_path / "a", "lora", tmp_path / "a")
    rewrite(tmp_path / "a", lambda t: t.update({k: v + 1 for k, v in t.items()}))
    with pytest.raises(weft.CheckpointError, match="checksum"):
        weft.export(tmp_path / "a", "lora", tmp_path / "b")


def test_the_command_prints_the_error_and_refuses_in_one_line(tmp_path, capsys):
    weft.save(awake("AdaLoRA").model, tmp_path / "a")
    assert (
        main(
            [
                "export",
                "--adapter",
                str(tmp_path / "a"),
                "--to",
                "lora",
                "--out",
                str(tmp_path / "b"),
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "AdaLoRA of 2 layers, now LoRA" in out and "(relative, measured)" in " ".join(
        out.split()
    )
    assert json.loads((tmp_path / "b" / CONFIG).read_text())["peft_type"] == "LORA"
    weft.save(awake("DoRA").model, tmp_path / "c")
    assert (
        main(
            [
                "export",
                "--adapter",
                str(tmp_path / "c"),
                "--to",
                "lora",
                "--out",
                str(tmp_path / "d"),
            ]
        )
        == 1
    )
    assert capsys.readouterr().err.count("\n") == 1
    assert (
        main(
            ["export", "--adapter", str(tmp_path / "c"), "--to", "x", "--out", str(tmp_path / "d")]
        )
        == 2
    )
    assert isinstance(config("DoRA"), weft.DoRA) and inputs("linear").ndim == 3


def test_what_stands_beside_the_tensors_goes_along(tmp_path):
    a = awake("LoRAFA", dropout=0.25, modules_to_save=["head"])
    weft.save(a.model, tmp_path / "a")
    weft.export(tmp_path / "a", "lora", tmp_path / "b")
    written = config_of(tmp_path / "b")
    assert written["modules_to_save"] == ["head"] and written["lora_dropout"] == 0.25
    assert (
        written["target_modules"] == "layer|mid"
        and weft.inspect(tmp_path / "b").base["class"] == "Net"
    )
    loaded = weft.load(net(), tmp_path / "b").config
    assert (loaded.dropout, loaded.modules_to_save) == (0.25, ("head",))


def test_a_model_of_conv1d_and_an_embedding(tmp_path):
    model = untied_gpt2()
    attached(model, weft.LoRAFA(r=4, alpha=6, targets=["wte", "c_attn"]))
    weft.save(model, tmp_path / "a")
    weft.export(tmp_path / "a", "lora", tmp_path / "b")
    written = config_of(tmp_path / "b")
    assert (
        written["fan_in_fan_out"] is True
        and r"transformer\.h\.0\.attn\.c_attn" in written["target_modules"]
    )
    close(logits(peft_reads(untied_gpt2(), tmp_path / "b")), logits(model), logits(untied_gpt2()))


def test_vera_with_ranks_of_their_own_or_an_embedding_is_lora_and_not_peft_s_vera(tmp_path):
    for kind, changes, says in (
        ("embedding", {}, "no form for the embedding 'layer'"),
        (
            "linear",
            {"targets": {"layer": {"r": 2}, "mid": {}}},
            "peft has one r for all layers, and 'layer' has r=2",
        ),
    ):
        a = awake("VeRA", kind, **changes)
        a.model.eval()
        weft.save(a.model, tmp_path / kind)
        with pytest.raises(weft.UnsupportedError, match=rf"{says}.*Export to 'lora'"):
            weft.export(tmp_path / kind, "peft", tmp_path / "peft")
        weft.export(tmp_path / kind, "lora", tmp_path / f"{kind}-lora")
        same(tmp_path / f"{kind}-lora", kind, a.x, logits(a.model, a.x))


def test_other_matrices_than_those_that_were_saved_are_refused(tmp_path, monkeypatch):
    weft.save(awake("VeRA").model, tmp_path / "a")
    monkeypatch.setattr(conversions, "shared_checksum", lambda shared: "0" * 16)
    with pytest.raises(
        weft.CheckpointError, match="A and B drawn from seed 7 are not those that were saved"
    ):
        weft.export(tmp_path / "a", "lora", tmp_path / "b")


def test_the_command_offers_the_forms_of_the_table():
    from weft.cli.export import FORMS

    assert FORMS == conversions.FORMS


@dataclass(frozen=True, kw_only=True)
class Core(LowRankConfig):
    """A method that Weft does not have: W' = W + s U (C V), its factors products of parameters, with a
    frozen V, a buffer that is saved as text, and a negative s.
    """

    def factors(self, p, training=False):
        return LowRank(p.core.double() @ p.V.double(), p.U * p.sign, s=-0.5)

    def shapes(self, out, in_):
        return {"U": (out, self.r), "core": (self.r, self.r)}

    def initial(self, layer, rng, shared):
        return {"U": rng.full((layer.out_features, self.r)), "core": torch.eye(self.r)}

    def frozen(self, out, in_, takes_ids, rng):
        return {"V": rng.without_nesting().uniform("V", (self.r, in_), 1.0)}

    def buffers(self, out, in_, device):
        return {"sign": torch.ones((), device=device)}

    def extra_state(self, p):
        return str(float(p.sign))

    def load_extra_state(self, p, text):
        p.sign.fill_(float(text))


@dataclass(frozen=True, kw_only=True)
class Sized(Core):
    """The same with a row scale of its own name."""

    def factors(self, p, training=False):
        return replace(super().factors(p), m=p.lengths)

    def shapes(self, out, in_):
        return {**super().shapes(out, in_), "lengths": (out,)}

    def initial(self, layer, rng, shared):
        return {**super().initial(layer, rng, shared), "lengths": layer.weight().norm(dim=1)}


@dataclass(frozen=True, kw_only=True)
class Dense(LayerConfig):
    """W' = W + D: a change of weights that is no product of thin matrices."""

    def forward(self, x, y, layer, p):
        return y + layer.down(x, p.D)

    def effective_weight(self, W, p):
        return W + p.D

    def shapes(self, out, in_):
        return {"D": (out, in_)}

    def initial(self, layer, rng, shared):
        return {"D": rng.full((layer.out_features, layer.in_features))}


@pytest.fixture
def new_methods(monkeypatch):
    """The classes above, registered as a new method is."""
    for cls in (Core, Sized, Dense):
        monkeypatch.setitem(METHODS, cls.__name__, cls)
    monkeypatch.setattr(NativeFormat, "methods", tuple(METHODS.values()))


@pytest.mark.parametrize("to", ["lora", "peft"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("new_methods")
def test_a_new_method_without_m_is_lora_without_an_edit(kind, to, tmp_path):
    a = awake("Core", kind, modules_to_save=["head"])
    for site in a.adapter.sites.values():
        site.sign.fill_(-1.0)
    a.model.eval()
    weft.save(a.model, tmp_path / "a")
    found = weft.export(tmp_path / "a", to, tmp_path / "b")
    assert (found.method, found.to, found.layers) == ("Core", "LoRA", 2)
    assert 0 < found.error < 1e-6  # the products were rounded once
    adapter = same(tmp_path / "b", kind, a.x, logits(a.model, a.x))
    assert {site.rank for site in adapter.sites.values()} == {3}
    assert set(adapter.selected) == {"head.weight", "head.bias"}


@pytest.mark.parametrize("held", ["float64", "bfloat16"])
@pytest.mark.usefixtures("new_methods")
def test_a_new_method_keeps_its_dtype(held, tmp_path):
    weft.save(awake("Core", held=held).model, tmp_path / "a")
    found = weft.export(tmp_path / "a", "lora", tmp_path / "b")
    assert found.error < 1e-14 if held == "float64" else 1e-4 < found.error < 1e-2


@pytest.mark.parametrize(
    ("method", "to", "says"),
    [
        ("Sized", "lora", "Sized cannot be exported to 'lora': its magnitudes rescale the rows"),
        ("Sized", "peft", "Sized cannot be exported to 'peft': peft has no such method"),
        ("Dense", "lora", "Dense cannot be exported to 'lora': its update is no product of two"),
        ("Dense", "peft", "Dense cannot be exported to 'peft': peft has no such method"),
    ],
)
@pytest.mark.usefixtures("new_methods")
def test_a_new_method_that_is_no_lora_is_refused_with_its_own_reason(method, to, says, tmp_path):
    weft.save(awake(method).model, tmp_path / "a")
    with pytest.raises(weft.UnsupportedError, match=says):
        weft.export(tmp_path / "a", to, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_what_peft_s_adalora_cannot_hold_is_lora_for_peft(tmp_path):
    a = awake("AdaLoRA", targets={"layer": {"r": 2}, "mid": {}})
    a.model.eval()
    weft.save(a.model, tmp_path / "a")
    assert config_of(tmp_path / "a")["peft_type"] == "WEFT_ADALORA"
    assert weft.export(tmp_path / "a", "peft", tmp_path / "b").to == "LoRA"
    same(tmp_path / "b", "linear", a.x, logits(a.model, a.x))
