"""The type of every field of every configuration is checked: in Python, in YAML, on the command
line, and in peft's files. The word "false" is never taken for true.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Literal, get_args

import numpy as np
import pytest
import torch

import weft
from support import METHODS, net
from weft import methods
from weft.cli import main
from weft.compare.plan.entries import parse_methods
from weft.inference.generate import check_settings
from weft.methods.field_types import WrongType, conform, hints_of, literal
from weft.training.config import RunConfig, from_dict, to_dict

VALUES = [True, 1, 1.5, "false", "1", None, ["a"], {"a": 1}, b"1", object(), 10**400, 1 + 1j]
# Several types; they have rules of their own.
FREE = {"targets", "train", "modules_to_save", "new_tokens", "exclude", "within", "layers"}
FIELDS = [
    (name, field.name)
    for name, cls in METHODS.items()
    for field in dataclasses.fields(cls)
    if field.name not in FREE
]
SECTIONS = [hint for hint in hints_of(RunConfig).values() if dataclasses.is_dataclass(hint)]
KEYS = [(cls, f.name) for cls in SECTIONS for f in dataclasses.fields(cls) if f.name not in FREE]


def fits(hint, value):
    """The rule, written once more: no boolean is a number, no text a boolean."""
    parts = [p for p in (bool, int, float, str) if p.__name__ in str(hint)]
    if isinstance(value, str) and str in get_args(hint):
        return True
    parts += [type(None)] if "None" in str(hint) else []
    if "Mapping" in str(hint) or "tuple" in str(hint):
        return None  # not by the scalar's type alone
    if isinstance(value, bool | str | type(None)):
        return type(value) in parts
    if isinstance(value, int):
        return (int in parts or float in parts) and value < 2**63  # 10**400 fits no float either
    return isinstance(value, float) and float in parts


def test_every_field_has_a_type_that_is_checked():
    known = (bool, int, float, str)
    for cls in [*METHODS.values(), *SECTIONS]:
        for name, hint in hints_of(cls).items():
            if name not in FREE:
                assert any(kind.__name__ in str(hint) for kind in known), (cls, name, hint)


@pytest.mark.parametrize(("name", "field"), FIELDS)
def test_a_method_takes_no_value_of_another_type(name, field):
    hint = hints_of(METHODS[name])[field]
    for value in VALUES:
        if fits(hint, value):
            continue  # of the right type; whether it is in range is another matter
        with pytest.raises(weft.ConfigError, match=rf"{name}\({field}="):
            METHODS[name](**{field: value})
        if "targets" in hints_of(METHODS[name]):
            with pytest.raises(weft.ConfigError, match=rf"{name}\({field}="):
                METHODS[name](targets={"q_proj": {field: value}})


@pytest.mark.parametrize(("cls", "key"), KEYS, ids=lambda x: getattr(x, "__name__", x))
def test_a_section_takes_no_value_of_another_type_from_python_either(cls, key):
    hint = hints_of(cls)[key]
    least = {"path": "m"} if cls.__name__ == "ModelSection" else {}
    for value in VALUES:
        right = fits(hint, value)
        if right or (right is None and isinstance(value, list | dict)) or (value is None):
            continue
        section = cls.__name__.removesuffix("Section").lower()
        with pytest.raises(weft.ConfigError, match=rf"{section}\.{key}="):
            cls(**{**least, key: value})


@pytest.mark.parametrize("field", sorted(FREE))
def test_fields_with_rules_of_their_own_take_no_other_types_either(field):
    for value in (True, 1, 1.5, None, [True], [1.5], [None], {"a": 1.5}, b"1", object(), 10**400):
        if field == "layers" and type(value) is int and value == 1:
            continue  # one block
        with pytest.raises(weft.ConfigError, match=field):
            weft.LoRA(**{field: value})


def test_items_of_lists_and_mappings_are_checked_too():
    run = {"out": "o", "model": {"path": "m"}, "method": {"name": "LoRA"}, "data": {"train": "d"}}
    for section, key, value in (
        ("model", "labels", [False, True]),  # YAML's no and yes
        ("optim", "betas", ["0.9", 0.99]),
        ("optim", "lr_factors", {"B": "16"}),
        ("data", "columns", {"prompt": 3}),
        ("data", "columns", {True: "a"}),
        ("log", "report_to", [1]),
    ):
        with pytest.raises(weft.ConfigError, match=rf"{section}\.{key}=.* is not"):
            from_dict({**run, section: {**run.get(section, {}), key: value}})
    config = from_dict(run)
    with pytest.raises(weft.ConfigError, match=r"method='lora': write a configuration"):
        dataclasses.replace(config, method="lora")
    with pytest.raises(weft.ConfigError, match=r"train=\{'steps': 3\}: write a TrainSection"):
        dataclasses.replace(config, train={"steps": 3})
    assert from_dict(to_dict(config)) == config


def test_numpy_s_numbers_become_python_s_and_whole_numbers_stay_whole():
    made = weft.LoRA(r=np.int64(4), alpha=np.float32(0.5), rslora=True)
    assert type(made.r) is int and type(made.alpha) is float
    assert type(weft.LoRA(alpha=16).alpha) is int
    assert json.loads(json.dumps(methods.to_json(made)))["alpha"] == 0.5
    with pytest.raises(weft.ConfigError, match="rslora must be True or False"):
        weft.LoRA(rslora=np.True_)
    with pytest.raises(weft.ConfigError, match="r must be a whole number"):
        weft.LoRA(r=torch.tensor(8))


def test_other_annotations():
    assert conform(list[int] | None, (1, 2)) == [1, 2]
    assert conform(tuple[int, ...], [1]) == (1,)
    assert conform(Mapping[str, float], {"a": 1}) == {"a": 1}
    assert conform(Literal["a", 1], 1) == 1
    assert conform(float, 10**20) == 1e20
    for hint, value, says in (
        (Literal["a", 1], True, "one of 'a', 1"),
        (Mapping[str, int], {1: 1}, "a mapping whose keys are text, and 1 is not"),
        (list[bool], "ab", "a list"),
        (int | str, 1.5, "a whole number or text"),
        (int, 10**5000, "below 2"),
        (float, 10**400, "that float64 can hold"),
    ):
        with pytest.raises(WrongType, match=says):
            conform(hint, value)
    marker = object()
    assert conform(Any, marker) is marker and conform(tuple[int, str], marker) is marker


def test_a_method_of_one_s_own_is_checked_as_well():
    class Local:
        pass

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Mine(weft.LoRA):
        strict: "bool" = False
        other: "Local | None" = None  # no module knows this name

    with pytest.raises(weft.ConfigError, match="Mine\\(r='8'\\)"):
        Mine(r="8")
    assert Mine(other=3).other == 3


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("false", False),
        ("False", False),
        ("FALSE", False),
        ("true", True),
        ("null", None),
        ("none", "none"),  # a value that some servers know
        ("no", "no"),
        ("1e-3", 1e-3),
        ("[1, 'a']", [1, "a"]),
        ("q_proj", "q_proj"),
        ("(" * 3000, "(" * 3000),
        ("9" * 5000, "9" * 5000),
        ("{[]: 1}", "{[]: 1}"),
    ],
)
def test_what_is_typed_on_a_command_line_is_a_literal_or_text(text, value):
    assert literal(text) == value and type(literal(text)) is type(value)


def test_words_for_booleans_on_the_command_line(tmp_path, capsys):
    assert parse_methods("lora:rslora=false")[0].config.rslora is False
    assert parse_methods("lora:rslora=TRUE")[0].config.rslora is True
    for word in ("no", "off", "0", "'false'"):
        with pytest.raises(weft.ConfigError, match="rslora must be True or False"):
            parse_methods(f"lora:rslora={word}")
    assert main(["plan", "--model", "x", "--method", "lora", "--set", "rslora=off"]) == 2
    assert "rslora must be True or False" in capsys.readouterr().err
    file = tmp_path / "c.yaml"
    file.write_text(
        'out: o\nmodel: {path: m}\ndata: {train: d.jsonl}\nmethod: {name: LoRA, rslora: "false"}\n'
    )
    assert main(["train", str(file)]) == 2
    assert "LoRA(rslora='false'): rslora must be True or False" in capsys.readouterr().err


def test_a_field_that_is_given_twice_on_the_command_line(tmp_path, capsys):
    with pytest.raises(weft.ConfigError, match="a field is given twice"):
        parse_methods("lora:r=4:alpha=8:r=8")
    model = tmp_path / "config.json"
    model.write_text('{"model_type": "gpt2"}')
    plan = ["plan", "--model", str(model), "--method", "lora"]
    for words in (["--r", "4", "--set", "r=8"], ["--set", "r=4", "--set", "r=8"]):
        assert main([*plan, *words]) == 2
        assert "--set 'r=8': r is given twice" in capsys.readouterr().err
    model.write_text('{"model_type": "gpt2", "n_layer": 1, "n_layer": 2}')
    assert main(plan) != 0
    assert "the key 'n_layer' is given twice" in capsys.readouterr().err


def test_a_word_for_a_setting_of_generate_that_takes_none():
    check_settings({"do_sample": literal("false"), "num_beams": 4, "early_stopping": "never"})
    for key in ("do_sample", "temperature", "use_cache", "num_beams"):
        with pytest.raises(weft.ConfigError, match=f"--set {key}=no: this is text"):
            check_settings({key: "no"})


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("LORA", {"use_rslora": "false"}),
        ("LORA", {"use_rslora": 0}),
        ("LORA", {"use_dora": "no"}),
        ("LORA", {"r": "3"}),
        ("LORA", {"r": True}),
        ("LORA", {"lora_alpha": "16"}),
        ("LORA", {"lora_alpha": None}),
        ("LORA", {"lora_dropout": "0.1"}),
        ("LORA", {"init_lora_weights": 1}),
        ("LORA", {"rank_pattern": {"layer": "4"}}),
        ("LORA", {"alpha_pattern": {"layer": True}}),
        ("LORA", {"alpha_pattern": [1]}),
        ("LORA", {"bias": False}),
        ("LORA", {"target_modules": {"layer": 1}}),
        ("LORA", {"target_modules": ["layer", 3]}),
        ("LORA", {"modules_to_save": "head"}),
        ("LORA", {"layers_to_transform": "0"}),
        ("LORA", {"fan_in_fan_out": "false"}),
        ("VERA", {"save_projection": "false"}),
        ("VERA", {"d_initial": "0.1"}),
        ("VERA", {"projection_prng_key": "0"}),
        ("ADALORA", {"init_r": "12"}),
        ("ADALORA", {"beta1": "0.85"}),
        ("ADALORA", {"rank_pattern": {"layer.lora_E": ["false"]}}),
        ("PROMPT_TUNING", {"num_virtual_tokens": "4"}),
    ],
)
def test_a_field_of_peft_of_another_type_is_refused_by_name(kind, changes, tmp_path):
    from safetensors.torch import save_file

    (field,) = changes
    config = {"peft_type": kind, "r": 3, "init_r": 3, "target_modules": ["layer"]}
    config |= {"num_virtual_tokens": 2, "token_dim": 4, "num_layers": 1}
    own = {"LORA": {"r"}, "VERA": {"r"}, "ADALORA": {"init_r"}, "PROMPT_TUNING": set()}[kind]
    drop = {"r", "init_r"} - own
    if kind != "PROMPT_TUNING":
        drop |= {"num_virtual_tokens", "token_dim", "num_layers"}
    config = {k: v for k, v in config.items() if k not in drop} | changes
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file({"x": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(weft.CheckpointError, match=rf"{field}=.*must be"):
        weft.load(net(), tmp_path)
