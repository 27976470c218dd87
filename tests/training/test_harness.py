"""lm-evaluation-harness asks our adapted model; a task of our own, from a file, so that nothing is
fetched.
"""

import json
import sys

import pytest
import tiny
import torch

import weft
from weft.cli import main
from weft.inference import harness
from weft.inference.opened import open_model

QUESTIONS = [
    ("ab", ["c", "zz", "q"], 0),
    ("one two", ["three", "x"], 1),
    ("say", ["yes", "no", "so"], 2),
]
TASK = """task: weft_tiny
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list:
  - metric: acc
  - metric: acc_norm
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("harness")
    tiny.language_model(folder / "lm")
    model = open_model(str(folder / "lm"), None).model
    weft.attach(model, weft.LoRA(r=2))
    with torch.no_grad():
        for _, p in sorted((n, p) for n, p in model.named_parameters() if p.requires_grad):
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 2)
    weft.save(model, folder / "adapter")
    (folder / "data.jsonl").write_text(
        "".join(
            json.dumps({"question": q, "choices": c, "label": n}) + "\n" for q, c, n in QUESTIONS
        )
    )
    (folder / "tasks").mkdir()
    (folder / "tasks" / "weft_tiny.yaml").write_text(TASK.format(file=folder / "data.jsonl"))
    return folder


def likelihood(opened, question, choice):
    """Sum over the choice's tokens, behind the question and a space."""
    before = opened.renderer.prompt_ids(question)
    ids = opened.renderer.prompt_ids(f"{question} {choice}")
    logits = opened.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return float(sum(logits[i - 1, ids[i]] for i in range(len(before), len(ids))))


@pytest.mark.slow  # the harness reads thousands of files to know its tasks
@pytest.mark.filterwarnings("ignore")  # the harness's own, and those of what it imports
def test_the_harness_scores_the_adapted_model_as_its_likelihoods_say(
    place, tmp_path, monkeypatch, capsys
):
    pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    words = [
        "eval",
        "--model",
        str(place / "lm"),
        "--lm-eval",
        "weft_tiny",
        "--lm-eval-path",
        str(place / "tasks"),
        "--device",
        "cpu",
        "--json",
        str(tmp_path / "s.json"),
    ]
    seen = {}
    for adapter in (None, str(place / "adapter")):
        assert main([*words, *([] if adapter is None else ["--adapter", adapter])]) == 0
        opened = open_model(str(place / "lm"), adapter, device="cpu")
        with torch.no_grad():
            best = [
                max(range(len(c)), key=lambda i, q=q, c=c: likelihood(opened, q, c[i]))
                for q, c, _ in QUESTIONS
            ]
        data = json.loads((tmp_path / "s.json").read_text())
        right = sum(b == n for b, (_, _, n) in zip(best, QUESTIONS, strict=True)) / len(QUESTIONS)
        assert data["scores"]["weft_tiny"]["acc,none"] == pytest.approx(right)
        assert data["examples"] == {"weft_tiny": 3} and data["schema"] == 1
        seen[adapter] = best
    assert len({str(best) for best in seen.values()}) == 2  # the adapter changes what is likely
    assert "acc,none" in capsys.readouterr().out
    assert (
        main([*words[:4], "weft_tyni", *words[5:]]) == 2 and "weft_tiny" in capsys.readouterr().err
    )


def test_without_the_package_the_command_names_it(place, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    assert main(["eval", "--model", str(place / "lm"), "--lm-eval", "piqa"]) == 1
    assert "pip install 'weft[lm-eval]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ([], "--task"),
        (["--task", "rte", "--lm-eval", "rte"], "give one of --task"),
        (["--lm-eval", "rte", "--outputs", "x"], "--outputs"),
        (["--lm-eval", "rte", "--split", "test"], "--split"),
        (["--task", "rte", "--shots", "2"], "--shots"),
        (["--lm-eval", "rte", "--shots", "-1"], "0 or more"),
    ],
)
def test_options_of_the_other_kind_are_refused(place, capsys, more, told):
    assert main(["eval", "--model", str(place / "lm"), *more]) == 2
    assert told in capsys.readouterr().err


def test_what_is_no_language_model_is_refused(place, tmp_path):
    pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")
    opened = open_model(str(place / "lm"), None)
    opened.model.can_generate = lambda: False
    with pytest.raises(weft.WeftError, match="no language model"):
        harness.harness_scores(opened, ["piqa"], None)
