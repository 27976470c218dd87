"""The configuration of `weft train`: what cannot be meant is refused by name, before anything is
loaded.
"""

import itertools
import os
import re
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import weft
from weft.cli import main
from weft.training.config import RunConfig, dump, from_dict, read_config, to_dict
from weft.training.config.yaml_loader import loader

SECTIONS = {
    name: hint
    for name, hint in get_type_hints(RunConfig).items()
    if hasattr(hint, "__dataclass_fields__")
}

LEAST = "out: o\nmodel: {path: m}\nmethod: {name: LoRA}\ndata: {train: d.jsonl}\n"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(LEAST)
    return path


def test_defaults_overrides_and_the_resolved_file_say_the_same(file, tmp_path):
    config = read_config(
        file, ["optim.lr=1e-3", "method.r=4", "optim.lr_factors.B=16", "log.report_to=[wandb]"]
    )
    assert (config.optim.lr, config.method, config.optim.lr_factors) == (
        1e-3,
        weft.LoRA(r=4),
        {"B": 16.0},
    )
    assert config.log.report_to == ("wandb",) and config.train.batch == 8
    again = tmp_path / "again.yaml"
    again.write_text(dump(config))
    assert read_config(again) == config
    assert from_dict(to_dict(config)) == config


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("optim.learning_rat=1", "optim.learning_rat is not known"),
        ("train.batchs=3", "Nearest: train.batch"),
        ("method.method=VeRA", "method.method='VeRA' is not known"),
        ("modle={path: x}", "modle is not known. Nearest: model"),
        ("optim.lr=abc", "optim.lr='abc': write a number"),
        ("optim.lr=true", "optim.lr=True: write a number"),
        ("optim.lr=0", "optim.lr=0.0: it must be above 0"),
        ("train.steps=2.5", "train.steps=2.5: write a whole number"),
        ("train=3", "train=3: write a mapping"),
        ("log.report_to=wandb", "log.report_to='wandb': write a list"),
        ("log.report_to=[wanb]", "'wanb' is not known. Nearest: wandb"),
        ("method.rank=3", "method: LoRA has no field 'rank'"),
        ("method.r=0", "method: LoRA(r=0)"),
        ("method.name=LoRB", "Nearest: ['LoRA', 'LoRAFA']"),
        ("method=LoRA", "method: write a mapping with a name"),
        ("optim.lr_factors.C=2", "LoRA trains no tensor of that name. It trains A, B"),
        ("optim.lora_plus=0", "optim.lora_plus=0.0: it must be above 0"),
        ("optim.lora_plus=true", "optim.lora_plus=True: write a number"),
        ("optim={lora_plus: 4, lr_factors: {B: 2}}", "are both rates of B; give one"),
        ("optim.lr_factors.B=0", "optim.lr_factors.B=0: write a number above 0"),
        ("optim.schedule=lineer", "Nearest: linear"),
        ("eval.best=loss", "eval.best needs evaluation data"),
        ("data.eval_share=1", "data.eval_share=1.0: it must be 0 or more and below 1"),
        ("task=e2e", "task='e2e' brings its data"),
        ("data.train=null", "data.train and task: give one of them"),
        ("train.steps", "write KEY=VALUE"),
        ("out.x=1", "'out' is a value and has no keys below it"),
        ("optim.lr=[", "is not readable YAML"),
    ],
)
def test_what_cannot_be_meant_is_one_line_and_status_2(file, capsys, setting, said):
    assert main(["train", str(file), "--set", setting]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_two_that_exclude_each_other(file, capsys):
    for settings, said in (
        (["train.steps=5", "train.epochs=1"], "give one of them"),
        (["data.eval_share=0.1", "eval.patience=2"], "eval.patience needs eval.best"),
        (["data.eval=x.csv", "data.eval_share=0.1"], "take one"),
        (["data.train=null", "task=e2e", "data.format=text"], "data.format has no meaning"),
        (["train.steps=5", "optim.warm_up=5"], "all of train.steps=5"),
    ):
        assert main(["train", str(file), *(w for s in settings for w in ("--set", s))]) == 2
        assert said in capsys.readouterr().err


def test_a_key_that_stands_twice_and_files_that_are_not_there(file, tmp_path, capsys):
    file.write_text(LEAST + "out: other\n")
    assert main(["train", str(file)]) == 2
    assert "'out' is given twice" in capsys.readouterr().err
    file.write_text(LEAST.replace("d.jsonl", str(tmp_path / "pears.jsonl")))
    (tmp_path / "pairs.jsonl").write_text("")
    assert main(["train", str(file)]) == 2
    assert "there is no such file. Nearest: pairs.jsonl" in capsys.readouterr().err
    assert main(["train", str(tmp_path / "none.yaml")]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_numbers_as_people_write_them(file):
    for text, value in (("1e-3", 1e-3), ("5E-4", 5e-4), (".5", 0.5), ("2", 2.0), ("1_0e-1", 1.0)):
        assert read_config(file, [f"optim.lr={text}"]).optim.lr == value


def test_the_examples_are_valid_and_the_page_names_every_key_and_no_other():
    root = Path(__file__).resolve().parents[2]
    examples = sorted((root / "recipes" / "examples").glob("*.yaml"))
    assert len(examples) >= 3
    for path in examples:
        read_config(path)
    table = (root / "docs" / "train.md").read_text().split("## Every key")[1].split("\n## ")[0]
    first = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    named = {key for cell in first for key in re.findall(r"`([a-z_.]+)`", cell)}
    wanted = set()
    for section in fields(RunConfig):
        inner = SECTIONS.get(section.name)
        wanted |= (
            {section.name} if inner is None else {f"{section.name}.{f.name}" for f in fields(inner)}
        )
    assert named - {"method.name"} == wanted - {"method"}


@pytest.mark.parametrize("method", ["VeRA", "BitFit", "LoRAFA", "AdaLoRA"])
def test_a_ratio_of_rates_needs_a_method_that_trains_a_and_b(file, capsys, method):
    settings = [f"--set=method={{name: {method}}}", "--set=optim.lora_plus=16"]
    assert main(["train", str(file), *settings]) == 2
    said = capsys.readouterr().err
    assert f"optim.lora_plus is a ratio of the rates of B and A, and {method} does not" in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("? [1, 2]\n: 3", "a key must be text"),
        ("1: 2", "a key must be text"),
        ("yes: 2", "a key must be text"),
        ("optim: {<<: 3}", "<< merges a mapping or a list of mappings only"),
        ("optim: {<<: [{lr: 1}, 3]}", "<< merges a mapping or a list of mappings only"),
        ("!!str [a]: 2", "a key must be text"),
        ("optim: {lr: " + "9" * 400 + "}", "a number of 400 characters"),
        ("train: {steps: " + "9" * 5000 + "}", "a number of 5000 characters"),
        ('adapter: {start: "\\ud800"}', "surrogate"),
        ('adapter: {start: "a\\0b"}', "NUL"),
        ("optim: &a [*a]", "within what it names"),
        ("optim: " + "[" * 40 + "]" * 40, "nested more than"),
        ("optim: " + "[" * 3000 + "]" * 3000, "nested too deeply"),
        ("optim: {lr: 1:30}", "optim.lr='1:30'"),
        ("train: {steps: 010}", "train.steps='010'"),
        ("optim: {lr: !!int x}", "not readable YAML"),
        ("optim: {lr: !!bool x}", "not readable YAML"),
        ("optim: {lr: !!timestamp x}", "not readable YAML"),
        ("optim: {lr: !!python/object:os.system x}", "not readable YAML"),
    ],
)
def test_extremes_of_yaml_are_refused_in_one_line(text, said, file):
    file.write_text(LEAST + text + "\n")
    with pytest.raises(weft.ConfigError) as caught:
        read_config(file)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_aliases_that_grow_are_refused(file):
    names = "abcdefghi"
    lines = [f"{names[0]}: &{names[0]} [x, x, x, x, x, x, x, x, x, x]"] + [
        f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]" for a, b in itertools.pairwise(names)
    ]
    file.write_text(LEAST + "\n".join(lines))
    with pytest.raises(weft.ConfigError, match="more than 100,000 values"):
        read_config(file)


def test_a_date_is_text(file):
    file.write_text(LEAST.replace("out: o", "out: 2026-01-02"))
    assert read_config(file).out == "2026-01-02"


# Numbers of either rule set, words and signs that YAML reads as something else, texts longer than a
# line of the file, and any other text.
_ANY = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
_TEXTS = st.one_of(
    st.from_regex(r"[-+]?[0-9][0-9_]*\.?[0-9]*([eE:][-+]?[0-9]{1,3})?", fullmatch=True),
    st.sampled_from(
        ["null", "~", "yes", "No", "<<", "=", "0x1F", "2026-01-01", ".inf", "", "#", "- a"]
    ),
    st.text(_ANY, max_size=30),
    st.lists(st.text(_ANY, max_size=9), max_size=40).map(" ".join),
)
_NAMES = _TEXTS.map(str.strip).filter(bool)


@given(
    _TEXTS,
    st.lists(_NAMES, min_size=2, max_size=5, unique=True),
    st.dictionaries(_TEXTS, _TEXTS, max_size=3),
    st.floats(min_value=0, exclude_min=True, allow_infinity=False),
)
def test_a_run_s_own_file_reads_back_whatever_its_texts_are(path, names, columns, rate):
    given = {
        "out": path,
        "model": {"path": path, "labels": names, "new_tokens": names},
        "method": {"name": "LoRA", "modules_to_save": names},
        "data": {"train": names, "columns": columns},
        "optim": {"lr": rate},
    }
    config = from_dict(given)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(dump(config), encoding="utf-8", newline="")
        assert read_config(file) == config
    assert from_dict(yaml.safe_load(dump(config))) == config


@pytest.mark.parametrize("text", ["1e3", "1_0e+5", "yes", "on", "1:30", "010", "2026-01-01", "<<"])
def test_a_text_that_looks_like_something_else_reads_back_as_text(text, file):
    config = from_dict(
        {
            "out": text,
            "model": {"path": "m", "labels": [text, "other"]},
            "method": {"name": "LoRA"},
            "data": {"train": "d.jsonl", "columns": {"prompt": text}},
        }
    )
    file.write_text(dump(config), encoding="utf-8")
    assert read_config(file) == config


def test_a_list_with_a_wrong_item_is_told_in_english(file):
    for setting, said in (
        (
            "model.labels=[1e3, 2e3]",
            "write None, or a list whose items are text, and 1000.0 is not.",
        ),
        ("data.train=[1]", "write text or None, or a list whose items are text, and 1 is not."),
        ("model.labels=3", "write a list or None."),
    ):
        with pytest.raises(weft.ConfigError) as caught:
            read_config(file, [setting])
        assert str(caught.value).endswith(said)


def test_a_merged_mapping_may_itself_be_a_merge_whose_keys_it_replaces(file):
    file.write_text(LEAST + "optim: &o {<<: &b {lr: 1, eps: 1}, lr: 2}\n")
    assert (read_config(file).optim.lr, read_config(file).optim.eps) == (2, 1)
    for key in ("x", "lr"):  # Python has one object for every text of one letter
        text = (
            f"b: &b {{{key}: 1, y: 1}}\nt: {{u: {{v: &a {{<<: *b, {key}: 2}}}}}}\n"
            f"c: {{<<: *a, y: 3}}\nd: {{<<: [*a, *b, {{z: 4}}]}}\ne: {{{key}: 5, <<: *a}}"
        )
        built = yaml.load(text, Loader=loader())
        assert built["t"]["u"]["v"] == {key: 2, "y": 1} and built["c"] == {key: 2, "y": 3}
        assert built["d"] == {key: 2, "y": 1, "z": 4} and built["e"] == {key: 5, "y": 1}
    for twice in ("{x: 1, x: 2}", "{<<: *b, x: 1, x: 1}", "{<<: {x: 1, x: 2}}", "[{x: 1, x: 2}]"):
        with pytest.raises(yaml.YAMLError, match="'x' is given twice"):
            yaml.load(f"b: &b {{x: 1}}\nc: {twice}", Loader=loader())


def test_what_is_no_regular_file_of_some_size_is_not_read(file):
    file.write_text(LEAST + "#" * 2**18)
    with pytest.raises(weft.ConfigError, match="bytes"):
        read_config(file)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(weft.ConfigError, match="it is a FIFO"):
        read_config(file)
