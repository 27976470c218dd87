"""Where peft 0.21.2 is wrong, or says nothing, and Weft is right, or refuses.

Every case first holds Weft to what is right, and then shows what peft does. Where another version
of peft no longer does it, the case is skipped with a message that says so: take it out of the list
then.
"""

from __future__ import annotations

import peft
import pytest
import torch
from checkpoint_support import (
    CONFIG,
    TENSORS,
    attached,
    classifier,
    config_of,
    copied,
    edit_config,
    llama,
    logits,
    peft_of,
    peft_saves,
    quiet,
    read,
    refused,
    rewrite,
    untouched,
    wake,
)
from peft import LoraConfig
from peft_cases import loads, lora, mine_of, peft_still, two, under, vera
from torch import Tensor, nn

import weft
from support import awake, distance, inputs, net

X = inputs("linear")


# Rows of a batch


def test_vera_ignores_the_adapter_names_of_the_rows(tmp_path):
    theirs = two(vera(), vera())
    model = mine_of(theirs, tmp_path)
    a, b, base = under(theirs, "a"), under(theirs, "b"), logits(net(), X)
    with weft.use(model, ["b", "a", None, "b"]), torch.no_grad():
        assert distance(model(X), torch.stack([b[0], a[1], base[2], b[3]])) < 1e-5
    theirs.set_adapter("a")
    with torch.no_grad():
        rows = theirs(X, adapter_names=["b", "a", "__base__", "b"])
    peft_still(
        torch.equal(rows, a) and distance(a, b) > 0.05, "VeRA gives every row the active adapter"
    )


def test_vera_accepts_made_up_names_for_the_rows(tmp_path):
    theirs = two(vera(), vera())
    model = mine_of(theirs, tmp_path)
    with pytest.raises(weft.WeftError, match=r"no adapter is named 'made-up'"):
        weft.use(model, ["a", "made-up", None, "b"])
    theirs.set_adapter("a")
    with torch.no_grad():
        rows = theirs(X, adapter_names=["made-up"] * 4)
    peft_still(torch.equal(rows, under(theirs, "a")), "VeRA takes a name that no adapter has")


def test_rows_of_a_batch_are_refused_for_dora(tmp_path):
    theirs = two(lora(use_dora=True), lora(r=2, use_dora=True))
    model = mine_of(theirs, tmp_path)
    a, b = under(theirs, "a"), under(theirs, "b")
    with weft.use(model, ["b", "a", "a", "b"]), torch.no_grad():
        assert distance(model(X), torch.stack([b[0], a[1], a[2], b[3]])) < 1e-5
    try:
        theirs(X, adapter_names=["b", "a", "a", "b"])
    except ValueError as error:
        peft_still("when DoRA is enabled" in str(error), "rows are refused")
    else:
        peft_still(False, "rows are refused where DoRA is among the adapters")


# Files


def test_extra_tensors_in_a_file_go_without_a_word(tmp_path):
    peft_saves(peft_of(net(), lora()), tmp_path)
    rewrite(
        tmp_path,
        lambda t: t.update(
            {"base_model.model.up.lora_A.weight": torch.ones(3, 7), "odd": torch.ones(2)}
        ),
    )
    refused(net(), tmp_path, "extra", "'odd' [2]", "'up'", x=X)
    _, said = loads(net, tmp_path)
    peft_still(said == [], "extra tensors are dropped in silence")


def test_all_keys_renamed_is_only_a_warning(tmp_path):
    peft_saves(peft_of(net(), lora()), tmp_path)
    rewrite(
        tmp_path,
        lambda t: [t.update({k.replace(".model.", ".model.net."): t.pop(k)}) for k in list(t)],
    )
    refused(net(), tmp_path, "no module 'net.layer'", "nearest in the model: ['layer']", x=X)
    theirs, said = loads(net, tmp_path)
    peft_still(
        len(said) == 1
        and "missing adapter keys" in said[0]
        and torch.equal(logits(theirs, X), logits(net(), X)),
        "the adapter does nothing, and there is a warning",
    )


def test_an_adapter_of_four_layers_loads_into_two_without_a_word(tmp_path):
    peft_saves(peft_of(llama(4), LoraConfig(r=3, target_modules=["q_proj"])), tmp_path)
    refused(llama(2), tmp_path, "no module 'model.layers.2.self_attn.q_proj'")
    _, said = loads(llama, tmp_path)
    peft_still(said == [], "half of the adapter is dropped in silence")


def test_a_llama_adapter_loads_into_a_mistral_without_a_word(tmp_path):
    peft_saves(peft_of(llama(), LoraConfig(r=3, target_modules=["q_proj"])), tmp_path)
    refused(llama(name="Mistral"), tmp_path, "LlamaForCausalLM", "MistralForCausalLM")
    _, said = loads(lambda: llama(name="Mistral"), tmp_path)
    peft_still(said == [], "the base is not compared")


@pytest.mark.parametrize(
    ("change", "text"),
    [(lambda t: t * float("nan"), "NaN"), (lambda t: (10 * t).to(torch.int8), "torch.int8")],
    ids=["nan", "int8"],
)
def test_numbers_that_cannot_be_meant_load_without_a_word(change, text, tmp_path):
    peft_saves(peft_of(net(), lora()), tmp_path)
    key = "base_model.model.mid.lora_B.weight"
    rewrite(tmp_path, lambda t: t.update({key: change(t[key])}))
    refused(net(), tmp_path, text, "mid.lora_B.weight'", x=X)
    _, said = loads(net, tmp_path)
    peft_still(said == [], "NaN and whole numbers are loaded in silence")


def test_a_flipped_bit_loads_without_a_word(tmp_path):
    """peft's files have no checksum; what Weft saves has, for Weft."""
    a = awake("LoRA")
    weft.save(a.model, tmp_path)
    whole = bytearray((tmp_path / TENSORS).read_bytes())
    whole[-1] ^= 0x40  # of an exponent
    (tmp_path / TENSORS).write_bytes(whole)
    refused(net(), tmp_path, "checksum", "its bits have changed", x=X)
    theirs, said = loads(net, tmp_path)
    peft_still(
        said == [] and distance(logits(theirs, X), a.run()) > 0.05,
        "other numbers are loaded in silence",
    )


def test_nan_is_saved_without_a_word(tmp_path):
    a = awake("LoRA")
    theirs = peft_of(net(), lora())
    with torch.no_grad():
        a.adapter.sites["mid"].B[0, 0] = float("nan")
        theirs.base_model.model.mid.lora_B["default"].weight[0, 0] = float("nan")
    with pytest.raises(weft.CheckpointError, match=r"'mid.B' holds NaN"):
        weft.save(a.model, tmp_path / "mine")
    with quiet() as said:
        theirs.save_pretrained(str(tmp_path / "theirs"))
    peft_still(
        said == [] and any(t.isnan().any() for t in read(tmp_path / "theirs")[0].values()),
        "NaN is saved in silence",
    )


def test_a_pickle_is_opened(tmp_path):
    """By torch's restricted reader, it must be said."""
    peft_saves(peft_of(net(), lora()), tmp_path)
    torch.save(read(tmp_path)[0], tmp_path / "adapter_model.bin")
    (tmp_path / TENSORS).unlink()
    refused(net(), tmp_path, "adapter_model.bin", "never opened")
    theirs, said = loads(net, tmp_path)
    peft_still(
        said == [] and distance(logits(theirs, X), logits(net(), X)) > 0.05, "a pickle is opened"
    )


class Nested(nn.Module):
    """Two layers whose names end alike."""

    def __init__(self) -> None:
        super().__init__()
        self.z = nn.ModuleDict({"a": nn.Linear(7, 9)})
        self.y = nn.ModuleDict({"a": nn.Linear(9, 5)})

    def forward(self, x: Tensor) -> Tensor:
        return self.y["a"](torch.tanh(self.z["a"](x)))


def nested() -> Nested:
    torch.manual_seed(0)
    return Nested()


def test_patterns_that_overlap_mean_something_else_after_saving(tmp_path):
    """The first pattern that fits counts, and the file has them sorted: other scales, other
    outputs, no word of it.
    """
    model = nested()
    attached(model, weft.LoRA(r=3, alpha=5, targets={"a": {"alpha": 9}, "z.a": {"alpha": 2}}))
    weft.save(model, tmp_path / "mine")
    again = nested()
    loaded = weft.load(again, tmp_path / "mine")
    assert torch.equal(logits(again, X), logits(model, X))
    assert {n: s.method.alpha for n, s in loaded.sites.items()} == {"z.a": 2, "y.a": 9}
    assert weft.attach(nested(), loaded.config).sites["z.a"].method.alpha == 2
    theirs = peft_of(
        nested(),
        LoraConfig(r=3, lora_alpha=5, target_modules=["a"], alpha_pattern={"z.a": 2, "a": 9}),
    )
    wake(theirs, 4)
    peft_saves(theirs, tmp_path / "theirs")
    other, said = loads(nested, tmp_path / "theirs")
    assert list(config_of(tmp_path / "theirs")["alpha_pattern"]) == ["a", "z.a"]
    peft_still(
        said == [] and distance(logits(other, X), logits(theirs, X)) > 0.05,
        "saved and loaded it is another adapter",
    )


# Which layers


def test_a_misspelt_target_beside_a_right_one_goes_without_a_word():
    for targets in (["layer", "mdi"], {"layer": {}, "mdi": {"r": 9}}):
        model = net()
        with (
            untouched(model, X),
            pytest.raises(weft.TargetError, match=r"'mdi' matches none.*\n?.*Nearest.*mid"),
        ):
            weft.attach(model, weft.LoRA(r=3, targets=targets))
    with quiet() as said:
        theirs = peft.get_peft_model(net(), lora(target_modules=["layer", "mdi"]))
    adapted = [n for n, m in theirs.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    peft_still(
        said == [] and adapted == ["base_model.model.layer"],
        "a target that fits nothing is dropped in silence",
    )


def test_modules_to_save_trains_modules_that_only_end_in_the_same_letters():
    """DistilBERT's pre_classifier, where "classifier" was asked for."""
    adapter = weft.attach(
        classifier("distilbert"), weft.LoRA(r=3, targets=["q_lin"], modules_to_save=["classifier"])
    )
    assert sorted(adapter.selected) == ["classifier.bias", "classifier.weight"]
    config = LoraConfig(target_modules=["q_lin"], modules_to_save=["classifier"])
    with quiet():
        theirs = peft.get_peft_model(classifier("distilbert"), config)
    trained = [n for n, p in theirs.named_parameters() if p.requires_grad]
    peft_still(any("pre_classifier" in n for n in trained), "pre_classifier is trained too")


def test_all_linear_fails_on_a_classifier_with_two_layers():
    model = classifier("distilbert")
    adapter = weft.attach(model, weft.LoRA(r=3, modules_to_save=["classifier", "pre_classifier"]))
    assert len(adapter.sites) == 12
    with quiet():
        try:
            peft.get_peft_model(
                classifier("distilbert"),
                LoraConfig(target_modules="all-linear", task_type="SEQ_CLS"),
            )
        except TypeError as error:
            peft_still(
                "modules_to_save cannot be applied" in str(error),
                "all-linear adapts what is to be trained whole",
            )
        else:
            peft_still(False, "all-linear adapts what is to be trained whole, and fails on it")


def test_a_second_vera_of_another_rank_or_seed(tmp_path):
    """Refused by peft; where the second rank is the smaller one, it is taken and the forward
    fails.
    """
    model = net()
    outputs = {}
    for name, r, seed in (("a", 3, 0), ("b", 5, 0), ("c", 2, 7)):
        attached(
            model, weft.VeRA(r=r, seed=seed, d_init=0.3, targets=["layer", "mid"]), name, seed=r
        )
        outputs[name] = logits(model, X)
        weft.save(model, tmp_path / name, name=name)
    for name, wanted in outputs.items():
        alone = net()
        weft.load(alone, tmp_path / name)
        with weft.use(model, name):
            assert torch.equal(logits(model, X), wanted)
        assert torch.equal(logits(alone, X), wanted)
    what = []
    for changes in ({"r": 5}, {"projection_prng_key": 7}, {"r": 2}):
        theirs = peft_of(net(), vera(), name="a")
        with quiet():
            try:
                theirs.add_adapter("b", vera(**changes))
                theirs.set_adapter("b")
                logits(theirs, X)
                what.append("runs")
            except (ValueError, RuntimeError) as error:
                what.append(type(error).__name__)
    peft_still(
        what == ["ValueError", "ValueError", "RuntimeError"], "a second VeRA must be like the first"
    )


def test_a_rank_of_zero_is_a_division_by_zero():
    with pytest.raises(weft.ConfigError, match=r"VeRA\(r=0\): r must be a whole number, 1 or more"):
        weft.VeRA(r=0)
    with quiet(), pytest.raises(Exception, match=r".") as caught:
        peft.get_peft_model(net(), vera(r=0))
    peft_still(isinstance(caught.value, ZeroDivisionError), "float division by zero")


def test_the_tools_of_these_cases_change_nothing_by_themselves(tmp_path):
    """An untampered file of peft's loads on both sides, so the refusals above are for the reasons
    given.
    """
    theirs = peft_of(net(), lora())
    peft_saves(theirs, tmp_path / "a")
    other = copied(tmp_path / "a")
    rewrite(other, lambda tensors: None)
    edit_config(other)
    assert (other / CONFIG).is_file()
    mine = net()
    weft.load(mine, other)
    again, said = loads(net, other)
    assert said == []
    assert distance(logits(mine, X), logits(theirs, X)) < 1e-5
    assert distance(logits(again, X), logits(theirs, X)) < 1e-5
