"""The model card: whatever a path or a name contains is shown and not obeyed."""

import ast

import pytest
import transformers
import yaml

from weft.tasks.quantize import QUANTIZE
from weft.training.card import card

NAMES = [
    "plain/name-1.0",
    'quo"ted',
    "colon: {and} #comment",
    "line\nbreak: injected\n---\n# title",
    "<script>alert(1)</script>",
    "[link](http://x) *bold* `code`",
    "back\\slash",
    "true",
    "12",
    "~",
    "- item",
    "ünïcode",
    "\x1b[31m",
]


def record(base, **model):
    return {
        "config": {
            "model": {"path": base, "dtype": "float32", **model},
            "method": {"name": "LoRA"},
            "train": {"seed": 0, "batch": 1, "accumulate": 1, "precision": "float32"},
            "task": None,
            "data": {"train": base},
            "optim": {"lr": 1e-3, "schedule": "linear", "warm_up": 0.0, "weight_decay": 0.0},
            "eval": {"best": None},
        },
        "classes": [base],
        "kind": "classification",
        "format": "label",
        "trained_numbers": 1,
        "head_numbers": 0,
        "steps_done": 1,
        "steps": 1,
        "samples": 1,
        "identity": {"train": "x"},
        "notes": [base],
    }


@pytest.mark.parametrize("base", NAMES)
def test_names_in_a_card(base):
    text = card(record(base), "adapter", True)
    _, front, rest = text.split("---\n", 2)
    assert yaml.safe_load(front)["base_model"] == base
    assert set(yaml.safe_load(front)) == {"base_model", "library_name", "tags"}
    code = rest.split("```python\n")[1].split("```")[0]
    names = {}
    seen = []
    source = code.replace("import weft\n", "").splitlines()[1:]
    names["AutoModelForSequenceClassification"] = type(
        "Auto", (), {"from_pretrained": lambda path, **_: seen.append(path)}
    )
    names["AutoTokenizer"] = type("Auto", (), {"from_pretrained": lambda *_: None})
    names["weft"] = type("Weft", (), {"load": lambda *_: None})
    exec("\n".join(source), names)  # noqa: S102 - the card that was just written
    assert seen == [base]
    assert "<script>" not in rest.replace(code, "")
    assert [line for line in rest.splitlines() if line.startswith("#")][1:] == [
        "## Load it",
        "## Training",
        "## Result",
    ]
    assert "\x1b" not in text


@pytest.mark.parametrize("data", ["one.jsonl", ["one.jsonl", "two.jsonl"]])
def test_the_data_of_a_run_may_be_a_list(data):
    own = record("base")
    own["config"]["data"] = {"train": data}
    assert "one.jsonl" in card(own, "adapter", True)


@pytest.mark.parametrize("quantize", list(QUANTIZE))
def test_a_quantised_base_is_loaded_as_it_was(quantize):
    text = card(record("base", quantize=quantize), "adapter", True)
    code = text.split("```python\n")[1].split("```")[0]
    calls = [
        node
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("from_pretrained")
    ]
    (given,) = [k for k in calls[0].keywords if k.arg == "quantization_config"]
    assert hasattr(transformers, ast.unparse(given.value.func))
    assert f"quantised: {quantize}" in text
