"""`load` is strict: what does not fit raises, names both sides and what was meant, and leaves the
model as it was.
"""

from __future__ import annotations

import json
import pickle
import random
import sys

import pytest
import torch
from checkpoint_support import (
    CONFIG,
    LAYERED,
    TENSORS,
    attached,
    classifier,
    config_of,
    edit_config,
    key_of,
    peft_file,
    peft_of,
    peft_saves,
    quiet,
    read,
    refused,
    rewrite,
    saved,
    untouched,
)
from safetensors.torch import save_file

import weft
from support import RULES, awake, net
from weft.methods import METHODS

PEFT_LAYOUT = ["LoRA", "DoRA", "AdaLoRA"]
NATIVE = [name for name in METHODS if name not in PEFT_LAYOUT]


@pytest.mark.parametrize(("writer", "method"), LAYERED)
def test_a_renamed_tensor(writer, method, tmp_path):
    directory, x = saved(tmp_path / "a", writer, method)
    key = key_of(directory)
    wrong = key.replace(".mid.", ".nid.")

    def rename(tensors):
        tensors[wrong] = tensors.pop(key)

    rewrite(directory, rename)
    short, other = key.removeprefix("base_model.model."), wrong.removeprefix("base_model.model.")
    refused(
        net(),
        directory,
        f"missing: {short!r}",
        other,
        "nearest",
        "['mid']" if writer == "peft" else f"{key!r}",
        x=x,
    )


@pytest.mark.parametrize(("writer", "method"), LAYERED)
def test_a_missing_tensor(writer, method, tmp_path):
    directory, x = saved(tmp_path / "a", writer, method)
    key = key_of(directory)
    rewrite(directory, lambda tensors: tensors.pop(key))
    refused(
        net(),
        directory,
        "missing",
        repr(key.removeprefix("base_model.model.")),
        "'mid'",
        "nearest in the file: ",
        x=x,
    )


@pytest.mark.parametrize(("writer", "method"), LAYERED)
def test_a_missing_layer(writer, method, tmp_path):
    directory, x = saved(tmp_path / "a", writer, method)
    rewrite(directory, lambda tensors: [tensors.pop(k) for k in list(tensors) if ".mid." in k])
    refused(net(), directory, "missing", "'mid", x=x)


@pytest.mark.parametrize(("writer", "method"), LAYERED)
def test_an_extra_tensor(writer, method, tmp_path):
    directory, x = saved(tmp_path / "a", writer, method)
    key = key_of(directory)
    rewrite(
        directory,
        lambda tensors: tensors.update({key + "x": torch.ones(3), "odd": torch.ones(2, 5)}),
    )
    refused(
        net(),
        directory,
        "extra",
        key.removeprefix("base_model.model.") + "x",
        "'odd' [2, 5]",
        "nearest",
        x=x,
    )


@pytest.mark.parametrize(("writer", "method"), LAYERED)
@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: t.t().contiguous() if t.ndim == 2 else t[:-1].clone(), "expected"),
        (lambda t: t[:0].clone(), "it is empty, shape [0"),
        (lambda t: torch.full_like(t, float("nan")), "NaN"),
        (lambda t: torch.full_like(t, float("inf")), "infinity"),
        (lambda t: t.to(torch.int32), "dtype torch.int32 in the file"),
    ],
    ids=["mis-shaped", "empty", "nan", "inf", "int"],
)
def test_a_tensor_that_cannot_be_meant(writer, method, change, text, tmp_path):
    directory, x = saved(tmp_path / "a", writer, method)
    key = key_of(directory, "B" if "ora" in method.lower() and method != "VeRA" else "lambda_b")
    rewrite(directory, lambda tensors: tensors.update({key: change(tensors[key])}))
    refused(net(), directory, key.removeprefix("base_model.model."), text, x=x)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: t[:, :-1].clone(), "expected"),
        (lambda t: t[:0].clone(), "empty"),
        (lambda t: t.to(torch.int32), "dtype"),
        (lambda t: t * float("nan"), "NaN"),
    ],
    ids=["shape", "empty", "int", "nan"],
)
@pytest.mark.parametrize("which", ["vera_A", "vera_B"])
def test_matrices_that_cannot_be_meant(which, change, text, tmp_path):
    directory = peft_file(tmp_path / "a", "VeRA")
    key = f"base_model.{which}"
    rewrite(directory, lambda tensors: tensors.update({key: change(tensors[key])}))
    refused(net(), directory, key, text)
    rewrite(directory, lambda tensors: tensors.pop(key))
    refused(net(), directory, "missing", key)


@pytest.mark.parametrize("method", NATIVE)
@pytest.mark.parametrize(
    "what", ["renamed", "missing", "extra", "shape", "empty", "nan", "int", "value"]
)
def test_a_tampered_file_of_our_own(method, what, tmp_path):
    a = awake(method)
    weft.save(a.model, tmp_path)
    key = next(iter(read(tmp_path)[0]))
    changes = {
        "renamed": lambda t: t.update({"q" + key: t.pop(key)}),
        "missing": lambda t: t.pop(key),
        "extra": lambda t: t.update({"q" + key: torch.ones(2)}),
        "shape": lambda t: t.update({key: t[key][..., :-1].clone()}),
        "empty": lambda t: t.update({key: t[key][:0].clone()}),
        "nan": lambda t: t.update({key: t[key] * float("nan")}),
        "int": lambda t: t.update({key: t[key].int()}),
        "value": lambda t: t.update({key: t[key] + 1}),
    }
    rewrite(tmp_path, changes[what])
    texts = {
        "renamed": ["missing", "extra", "nearest"],
        "missing": ["missing"],
        "extra": ["extra", "nearest"],
    }
    refused(net(), tmp_path, key, *texts.get(what, ["checksum"]), x=a.x)


@pytest.mark.parametrize("method", RULES)
@pytest.mark.parametrize("what", ["missing", "renamed", "int", "shape", "nan"])
def test_a_tampered_head(method, what, tmp_path):
    """modules_to_save: base tensors are held to the same rules as the adapter's own."""
    a = awake(method, modules_to_save=["head"])
    weft.save(a.model, tmp_path)
    key = next(k for k in read(tmp_path)[0] if k.endswith("head.bias"))
    changes = {
        "missing": lambda t: t.pop(key),
        "renamed": lambda t: t.update({key[:-1]: t.pop(key)}),
        "int": lambda t: t.update({key: t[key].int()}),
        "shape": lambda t: t.update({key: t[key][:-1].clone()}),
        "nan": lambda t: t.update({key: t[key] * float("nan")}),
    }
    rewrite(tmp_path, changes[what])
    refused(net(), tmp_path, "head.bias", x=a.x)


def test_a_missing_tensor_that_only_peft_asks_for(tmp_path):
    """DistilBERT's pre_classifier: the base's own values, and still part of what was saved."""
    model = classifier("distilbert")
    attached(model, weft.LoRA(r=3, targets=["q_lin"], modules_to_save=["classifier"]))
    weft.save(model, tmp_path)
    rewrite(tmp_path, lambda t: t.pop("base_model.model.pre_classifier.weight"))
    refused(classifier("distilbert"), tmp_path, "missing: 'base_model.model.pre_classifier.weight'")


def test_a_head_that_the_file_has_twice(tmp_path):
    directory = peft_file(tmp_path / "a", modules_to_save=["head"])
    key = "base_model.model.head.bias"
    rewrite(
        directory,
        lambda t: t.update({"base_model.model.head.modules_to_save.default.bias": t[key] + 1}),
    )
    refused(net(), directory, "extra: 'head.", "bias'")


@pytest.mark.parametrize("what", ["missing", "renamed", "int", "shape", "nan", "empty"])
def test_a_tampered_head_from_peft(what, tmp_path):
    import peft

    with quiet():
        made = peft.LoraConfig(
            r=3, lora_alpha=5, target_modules=["layer", "mid"], modules_to_save=["head"]
        )
    directory = peft_saves(peft_of(net(), made), tmp_path / "a")
    key = "base_model.model.head.bias"
    changes = {
        "missing": lambda t: t.pop(key),
        "renamed": lambda t: t.update({key[:-1]: t.pop(key)}),
        "int": lambda t: t.update({key: t[key].int()}),
        "shape": lambda t: t.update({key: t[key][:-1].clone()}),
        "nan": lambda t: t.update({key: t[key] * float("nan")}),
        "empty": lambda t: t.update({key: t[key][:0].clone()}),
    }
    weft.load(net(), directory)
    rewrite(directory, changes[what])
    refused(net(), directory, "head.bias")


@pytest.mark.parametrize("method", METHODS)
def test_one_flipped_bit_anywhere(method, tmp_path):
    """In numbers, names, shapes or header: refused, or (in the one word that says nothing) without
    effect.
    """
    a = awake(method)
    weft.save(a.model, tmp_path)
    whole = (tmp_path / TENSORS).read_bytes()
    chosen = [*random.Random(7).sample(range(8 * len(whole)), 150), 8 * len(whole) - 1]
    quietly, model = [], net(variant=method)
    for place in chosen:
        flipped = bytearray(whole)
        flipped[place // 8] ^= 1 << place % 8
        (tmp_path / TENSORS).write_bytes(flipped)
        try:
            found = weft.load(model, tmp_path)
        except weft.CheckpointError:
            continue
        quietly.append(place)
        assert all(
            torch.equal(p, q)
            for p, q in zip(a.adapter.parameters(), found.parameters(), strict=True)
        ), place
        assert found.config == a.config
        weft.detach(model)
    harmless = whole.index(b'"format":"pt"')  # peft's word for the framework
    assert all(
        harmless <= place // 8 < harmless + 13 or whole[place // 8] == 0x20 for place in quietly
    ), quietly


@pytest.mark.parametrize(("writer", "method"), LAYERED)
def test_a_truncated_file(writer, method, tmp_path):
    directory, x = saved(tmp_path / "a", writer, method)
    whole = (directory / TENSORS).read_bytes()
    for length in (0, 5, 40, len(whole) // 2, len(whole) - 1):
        (directory / TENSORS).write_bytes(whole[:length])
        refused(net(), directory, TENSORS, "cut off", x=x)
    (directory / TENSORS).write_bytes(whole + b"\0\0\0\0")
    refused(net(), directory, TENSORS, x=x)


@pytest.mark.parametrize("method", METHODS)
def test_a_lost_header(method, tmp_path):
    """What peft can read is then a file of peft's, layers, ranks and scales and all; anything else
    is refused.
    """
    ranks = (
        {"layer": {"r": 2, "rslora": True}, "mid": {}}
        if method in ("LoRA", "DoRA")
        else ["layer", "mid"]
    )
    a = awake(method, targets=ranks)
    weft.save(a.model, tmp_path)
    rewrite(tmp_path, lambda tensors: None, metadata=False)
    if method in NATIVE:
        refused(net(variant=method), tmp_path, "lost the header", x=a.x)
        return
    model = net(variant=method)
    loaded = weft.load(model, tmp_path)
    assert weft.inspect(tmp_path).writer == "peft"
    assert all(
        torch.equal(p, q) for p, q in zip(a.adapter.parameters(), loaded.parameters(), strict=True)
    )
    assert torch.allclose(a.run(), model(a.x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_a_configuration_that_was_edited_by_hand(method, tmp_path):
    a = awake(method)
    weft.save(a.model, tmp_path)
    before = config_of(tmp_path)
    if method in PEFT_LAYOUT:
        edit_config(tmp_path, lora_alpha=7, lora_dropout=0.5)
        texts = ["lora_alpha: 7 in it, 5", "lora_dropout: 0.5 in it, 0.0 saved"]
    else:
        edit_config(tmp_path, weft={**before["weft"], "modules_to_save": ["mid"]})
        texts = ["weft: {", "'modules_to_save': ['mid']", "'modules_to_save': []"]
    refused(
        net(variant=method),
        tmp_path,
        "adapter_config.json is not the one that was saved",
        *texts,
        x=a.x,
    )
    (tmp_path / CONFIG).write_text(
        json.dumps({**before, "revision": "v1", "task_type": "CAUSAL_LM"})
    )
    weft.load(net(variant=method), tmp_path)  # what a hub fills in
    (tmp_path / CONFIG).write_text("{")
    refused(net(variant=method), tmp_path, "no readable JSON")
    (tmp_path / CONFIG).write_text("[1]")
    refused(net(variant=method), tmp_path, "holds list")
    (tmp_path / CONFIG).unlink()
    assert "adapter_config.json is missing" in str(
        weft.load(net(variant=method), tmp_path).load_report
    )


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"r": 2}, "shape [3, 7] in the file, [2, 7] expected"),
        ({"r": "3"}, "r must be a whole number"),
        ({"lora_alpha": 0}, "alpha must be a number"),
        ({"lora_alpha": "much"}, "much"),
        ({"use_dora": True}, "missing"),
        ({"rank_pattern": {"mid": 4}}, "[4, 11] expected"),
        ({"alpha_pattern": {"mi(d": 4}}, "unterminated subpattern"),
        ({"rank_pattern": [3]}, "adapter_config.json"),
        ({"target_modules": ["layer", "mid", "head"]}, "nothing for 'head'"),
        ({"target_modules": "mi(d"}, "is no regular expression"),
        ({"peft_type": None}, "peft_type=None"),
        ({"peft_type": ["LORA"]}, "peft_type=['LORA']"),
        ({"modules_to_save": ["head"]}, "no 'head.weight'"),
        ({"modules_to_save": "head"}, "modules_to_save"),
        ({"auto_mapping": ["Net"]}, "adapter_config.json"),
    ],
    ids=str,
)
def test_a_configuration_of_peft_that_was_edited_by_hand(changes, text, tmp_path):
    directory = peft_file(tmp_path / "a", "LoRA")
    edit_config(directory, **changes)
    refused(
        net(),
        directory,
        text,
        error=weft.UnsupportedError if "peft_type" in changes else weft.CheckpointError,
    )


def test_a_configuration_of_vera_that_was_edited_by_hand(tmp_path):
    directory = peft_file(tmp_path / "a", "VeRA")
    edit_config(directory, r=4)
    refused(net(), directory, "[4] expected", "at least [4, 11] and [11, 4] expected")
    edit_config(directory, r=3, projection_prng_key=-1)
    refused(net(), directory, "seed must be")


@pytest.mark.parametrize("method", ["VeRA", "DVoRA"])
def test_other_matrices_than_those_that_were_saved(method, tmp_path, monkeypatch):
    """A generator whose bits changed would make other matrices from the same seed."""
    from weft.checkpoint import drawn
    from weft.ops import philox

    a = awake(method)
    weft.save(a.model, tmp_path)
    weft.load(net(), tmp_path)
    wanted = drawn.shared_checksum(a.adapter.sites["mid"].shared)
    true = philox.uniform

    def other(*args, **kwargs):
        out = true(*args, **kwargs)
        out[0, 0] = torch.nextafter(out[0, 0], torch.tensor(9.0))
        return out

    monkeypatch.setattr(philox, "uniform", other)
    drawn._drawn_checksum.cache_clear()
    refused(net(), tmp_path, "seed 7, r=3", f"{wanted} was saved", x=a.x)
    drawn._drawn_checksum.cache_clear()


def test_another_seed_in_the_configuration(tmp_path):
    a = awake("VeRA")
    weft.save(a.model, tmp_path)
    edit_config(tmp_path, weft={**config_of(tmp_path)["weft"], "seed": 8})
    refused(net(), tmp_path, "'seed': 8", "'seed': 7", x=a.x)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was opened",))


@pytest.mark.parametrize(
    "name", ["adapter_model.bin", "pytorch_model.bin", "adapter.pt", "last.ckpt"]
)
def test_a_pickle_is_refused_and_never_opened(name, tmp_path):
    a = awake("LoRA")
    weft.save(a.model, tmp_path)
    (tmp_path / TENSORS).unlink()
    (tmp_path / name).write_bytes(pickle.dumps({"x": Bomb()}))
    refused(net(), tmp_path, name, "pickle", "never opened", "safe_serialization=True")
    refused(net(), tmp_path / name, name, "pickle")


def test_a_pickle_under_the_name_of_the_tensors(tmp_path):
    a = awake("LoRA")
    weft.save(a.model, tmp_path)
    for data in (pickle.dumps({"x": Bomb()}), pickle.dumps({"x": Bomb()}, protocol=0)):
        (tmp_path / TENSORS).write_bytes(data)
        refused(net(), tmp_path, "no readable safetensors file")


def test_places_without_a_checkpoint(tmp_path):
    refused(net(), tmp_path / "nowhere", "does not exist", "save_pretrained")
    refused(net(), tmp_path, f"has no {TENSORS}", "it holds nothing")
    (tmp_path / "config.json").write_text("{}")
    refused(net(), tmp_path, "it holds ['config.json']")
    refused(net(), tmp_path / "config.json", "is a file. Give the directory")
    a = awake("LoRA")
    weft.save(a.model, tmp_path)
    weft.load(net(), tmp_path / TENSORS)
    edit_config(tmp_path)
    save_file({"a": torch.ones(2)}, str(tmp_path / TENSORS))
    (tmp_path / CONFIG).unlink()
    refused(net(), tmp_path, f"has no {CONFIG}")


@pytest.mark.parametrize("kind", ["IA3", "LOHA", "P_TUNING", "NEW", None, 3])
def test_an_unknown_type_of_adapter(kind, tmp_path):
    directory = peft_file(tmp_path / "a", "LoRA")
    edit_config(directory, peft_type=kind)
    refused(
        net(),
        directory,
        f"peft_type={kind!r}",
        "['LORA', 'ADALORA', 'PREFIX_TUNING', 'PROMPT_TUNING', 'VERA']",
        error=weft.UnsupportedError,
    )


def test_a_type_without_its_tensors(tmp_path):
    directory = peft_file(tmp_path / "a", "LoRA")
    (directory / CONFIG).write_text(
        json.dumps({"peft_type": "VERA", "r": 3, "save_projection": False})
    )
    refused(net(), directory, "holds no tensor of peft's VERA", "lora_A")


def test_a_later_schema_says_to_update(tmp_path):
    from weft.checkpoint import header

    a = awake("LoRA")
    weft.save(a.model, tmp_path)
    tensors, head = read(tmp_path)
    head["weft"] = head["weft"].replace('"schema":1', '"schema":2')
    head["weft_seal"] = header._seal(head)
    save_file(tensors, str(tmp_path / TENSORS), metadata=head)
    refused(net(), tmp_path, "schema 2; this Weft reads schema 1. Update weft")
    head["weft"] = head["weft"].replace('"schema":2', '"schema":1').replace('"r":3', '"rank":3')
    head["weft_seal"] = header._seal(head)
    save_file(tensors, str(tmp_path / TENSORS), metadata=head)
    refused(net(), tmp_path, "LoRA has no field 'rank'")


def test_a_model_without_values_is_not_filled(tmp_path):
    weft.save(awake("LoRA").model, tmp_path / "lora")
    weft.save(awake("Full").model, tmp_path / "full")
    with torch.device("meta"):
        model = type(net())()
    for which in ("lora", "full"):
        with pytest.raises(weft.CheckpointError, match="meta device"):
            weft.load(model, tmp_path / which)
        assert not weft.adapters(model)


def test_a_failure_while_filling_takes_the_adapter_off_again(tmp_path, monkeypatch):
    a = awake("DoRA", modules_to_save=["head"])
    weft.save(a.model, tmp_path)
    model = net()

    def fail(adapter, plan):
        raise MemoryError

    monkeypatch.setattr(sys.modules["weft.checkpoint.load"], "_fill", fail)
    with untouched(model, a.x), pytest.raises(MemoryError):
        weft.load(model, tmp_path)
    for active in (
        "default",
        None,
        ["default", None, "default", None],
    ):  # and the one that was active still is
        other = awake("LoRA").model
        weft.use(other, active)
        with untouched(other, a.x), pytest.raises(MemoryError):
            weft.load(other, tmp_path, name="second")


def test_a_refused_load_leaves_other_adapters_alone(tmp_path):
    a = awake("DoRA", modules_to_save=["head"])
    weft.save(a.model, tmp_path / "a")
    rewrite(tmp_path / "a", lambda tensors: tensors.pop("base_model.model.mid.lora_B.weight"))
    refused(a.model, tmp_path / "a", "missing", x=a.x)
    with weft.use(a.model, None):
        refused(a.model, tmp_path / "a", "missing", x=a.x)


def test_while_another_adapter_is_merged(tmp_path):
    a = awake("LoRA")
    weft.save(a.model, tmp_path)
    weft.merge(a.model)
    refused(a.model, tmp_path, "merged", error=weft.MergeError, x=a.x)
