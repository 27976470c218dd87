"""`weft compare` on tasks whose answers are text: real comparisons of a tiny Llama, and what a
stranger gets wrong.
"""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from comparing import Finished, compare, weft_command

import weft
from training.tiny import encoder, language_model
from weft.compare.plan.entries import parse_methods
from weft.compare.plan.sweep import RunSpec
from weft.compare.run.trial_runner import TrialRunner
from weft.compare.tasks.loop import forward_loss
from weft.compare.tasks.open_task import open_task
from weft.inference.opened import open_model
from weft.tasks import find_any, find_generation
from weft.tasks.models import find_model

FOOD = ("Thai", "French", "Greek", "Fast", "Malay")
CPU = torch.device("cpu")


def e2e(folder: Path, meanings: int = 5, tests: int = 3) -> Path:
    """Two references a meaning, in the LoRA paper's lines; no file for training."""
    folder.mkdir()
    lines = [
        f"name : {name} | food : {food}||{text}"
        for name, food in zip("ABCDE", FOOD, strict=True)
        for text in (f"{name} serves {food} food .", f"eat {food} food at {name} .")
    ]
    (folder / "valid.txt").write_text("\n".join(lines[: 2 * meanings]) + "\n")
    (folder / "test.txt").write_text(
        "\n".join(line.replace("name : ", "name : Old ") for line in lines[: 2 * tests]) + "\n"
    )
    return folder


def boolq(folder: Path, train: int = 10, test: int = 6) -> Path:
    folder.mkdir()
    for split, size in (("train", train), ("test", test)):
        rows = [
            {"instruction": f"Is {i} {split}?", "input": "", "answer": ("false", "true")[i % 2]}
            for i in range(size)
        ]
        (folder / f"{split}.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return language_model(tmp_path_factory.mktemp("model") / "llama", biases=True)


@pytest.fixture(scope="module")
def done(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Two methods on E2E. There is no Java on the PATH: METEOR needs it."""
    place = tmp_path_factory.mktemp("e2e")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(place))
        return compare(place / "out", *words(llama, e2e(place / "data")))


def words(llama: Path, data: Path) -> tuple[str, ...]:
    return (
        "--model",
        str(llama),
        "--task",
        f"e2e:{data}:train=validation",
        "--methods",
        "lora:r=2,bitfit",
        "--seeds",
        "1",
        "--lr",
        "lora=1e-5,1e-2",
        "--lr",
        "bitfit=1e-2",
        "--budget",
        "steps=6,batch=4",
        "--workers",
        "1",
        "--warm-up",
        "0.5",
        "--weight-decay",
        "0.1",
    )


def test_a_comparison_on_e2e_is_scored_by_its_metrics_and_tuned_by_the_loss(done: Finished) -> None:
    assert done.status == 0, done.errors
    data = done.json
    assert (data["kind"], data["metric"], data["classes"]) == ("generation", "BLEU", [])
    assert data["validation"] == {"metric": "loss", "lowest_is_best": True}
    assert data["examples"] == {"train": 8, "validation": 1, "test": 3}
    assert (data["head"], data["head_trainable"]) == ([], 0)
    lora, bitfit = data["rows"]
    assert lora["trainable"] == 2 * 2 * (4 * (16 + 16) + 3 * (16 + 28))
    assert (
        lora["lr"] == 1e-2 and lora["lr_validation"]["1e-2"] < lora["lr_validation"]["1e-5"]
    )  # the lower loss
    for row in (lora, bitfit):
        assert list(row["metrics"]) == ["BLEU", "NIST", "METEOR", "ROUGE-L", "CIDEr"]
        assert row["metrics"]["BLEU"] == row["scores"] and row["metrics"]["METEOR"] == [None]
        assert row["peak_bytes"] > 0 and row["step_ratio"] > 0 and row["example_gap"] is None
    said = " ".join(done.printed.split())
    assert "generated answers, 8 train, 1 validation, 3 test examples" in said
    assert "chosen by the lowest loss on the validation split" in said
    assert (
        "METEOR is missing: " in said
        and "num_beams=10" in said
        and "held out by a fixed seed" in said
    )
    assert max(len(line) for line in done.printed.splitlines() if str(done.out) not in line) <= 80


def test_the_files_name_the_metric_and_have_all_of_them(done: Finished) -> None:
    with (done.out / "runs.csv").open(encoding="utf-8", newline="") as file:
        runs = [run for run in csv.DictReader(file) if run["purpose"] == "final"]
    assert [run["test_NIST"] for run in runs] == [
        str(row["metrics"]["NIST"][0]) for row in done.json["rows"]
    ]
    assert all(run["test_METEOR"] == "" for run in runs)
    report = (done.out / "report.md").read_text(encoding="utf-8")
    assert "| method | BLEU | NIST | METEOR | ROUGE-L | CIDEr |" in report
    assert "| validation loss | test BLEU |" in report and "lowest mean validation loss" in report
    assert "BLEU %" not in report and "of the head" not in report
    assert "weight decay 0.1; the rate rises over 0.5 of the steps" in report


def test_the_saved_adapter_is_the_one_that_was_scored(done: Finished, llama: Path) -> None:
    row = done.json["rows"][0]
    runs = [run for run in done.runs.values() if run["spec"]["purpose"] == "final"]
    scored = next(run for run in runs if run["spec"]["label"] == row["method"])
    task = open_task(done.json["task"], None, find_model(str(llama)), {})
    base = task.validate().loss
    weft.load(task.model, row["adapter"])
    assert task.validate().loss == pytest.approx(scored["validation"]["loss"], rel=1e-6)
    assert abs(task.validate().loss - base) > 1e-3


def test_resume_repeats_nothing_and_refuses_another_recipe(done: Finished, llama: Path) -> None:
    given = list(words(llama, Path(done.json["task"].split(":")[1])))
    again = compare(done.out, *given, "--resume")
    assert again.status == 0, again.errors
    assert again.runs == done.runs
    given[given.index("--warm-up") + 1] = "0.1"
    other = compare(done.out, *given, "--resume")
    assert other.status == 2 and "--warm-up 0.5, and this one has 0.1" in other.errors


def test_a_comparison_on_boolq_says_which_examples_are_right(llama: Path, tmp_path: Path) -> None:
    out = compare(
        tmp_path / "out",
        "--model",
        str(llama),
        "--task",
        f"boolq:{boolq(tmp_path / 'data')}",
        "--methods",
        "lora:r=2,full",
        "--lr",
        "lora=1e-2",
        "--lr",
        "full=1e-3",
        "--seeds",
        "1",
        "--workers",
        "1",
        "--budget",
        "steps=4,batch=4,test=5",
    )
    assert out.status == 0, out.errors
    assert out.json["metric"] == "accuracy"
    assert out.json["examples"] == {"train": 8, "validation": 2, "test": 5}
    assert "accuracy %" in out.printed and "test: 5 of 6 examples are used" in " ".join(
        out.printed.split()
    )
    final = [run for run in out.runs.values() if run["spec"]["purpose"] == "final"]
    assert len(final) == 2
    for run in final:
        assert len(run["right"]) == 5 and run["right"].count("1") / 5 == run["test"]["score"]
    assert {row["example_gap"]["examples"] for row in out.json["rows"] if row["example_gap"]} == {5}
    full = out.json["rows"][1]
    assert (
        full["trainable"]
        == weft.attach(open_model(str(llama), None).model, weft.Full()).num_parameters
    )
    assert full["head_trainable"] == 0


def opened(llama: Path, place: Path):
    return open_task(
        f"e2e:{e2e(place / 'data')}:train=validation", None, find_model(str(llama)), {}
    )


def by_hand(task, row) -> tuple[float, int]:
    """Summed loss of one sample in float64 without padding, and its tokens: those behind the
    prompt, eos with them.
    """
    ids, start = (
        list(row["input_ids"]),
        next(i for i, label in enumerate(row["labels"]) if label >= 0),
    )
    logits = task.model.double()(input_ids=torch.tensor([ids])).logits[0]
    task.model.float()
    text = task.renderer.tokenizer.decode(ids[:start])
    assert (
        text.endswith("\n") and ids[-1] == task.renderer.tokenizer.eos_token_id
    )  # a prompt ends with its line
    return -sum(
        torch.log_softmax(logits[i - 1], 0)[ids[i]].item() for i in range(start, len(ids))
    ), len(ids) - start


def test_the_loss_is_that_of_the_completion_s_tokens_in_float64(
    llama: Path, tmp_path: Path
) -> None:
    task = opened(llama, tmp_path)
    with torch.no_grad():
        for parameter in task.model.parameters():  # a new model gives every token the same
            parameter += 0.3 * torch.randn_like(parameter)
    rows = torch.arange(len(task.train))
    assert (
        len({len(task.train.encoded[i]["input_ids"]) for i in rows.tolist()}) > 2
    )  # so there is padding
    sums = [by_hand(task, task.train.encoded[i]) for i in rows.tolist()]
    loss = forward_loss(task.model, task.train.batch(rows), task.train.wanted(rows))
    assert loss.item() == pytest.approx(sum(s for s, _ in sums) / sum(n for _, n in sums), rel=1e-5)
    held = [by_hand(task, row) for row in task.validation.encoded.rows]
    assert task.validate().loss == pytest.approx(
        sum(s for s, _ in held) / sum(n for _, n in held), rel=1e-5
    )


@pytest.mark.parametrize(
    "method", ["full", "head", "prefix:n=2", "preembed:l_p=1:l_i=1", "vera:r=4", "dvora:r=4"]
)
def test_methods_of_every_kind_train_and_answer(
    method: str, llama: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(
        "weft.tasks.caption_scores.has_java", lambda: False
    )  # seconds, and 2 GB, for METEOR
    task = opened(llama, tmp_path)
    task.task = replace(task.task, generation={"max_new_tokens": 4, "do_sample": False})
    runner = TrialRunner(task, CPU)
    config = weft.methods.to_json(parse_methods(method)[0].with_head(runner.head, 0))
    result = runner.run(RunSpec(method, config, 1e-2, 7.0, 0, 4, 4, "final"))
    assert result["status"] == "finished", result
    assert result["trainable"] > 0 and result["head_trainable"] == 0
    assert result["losses"][-1] < 10  # the head's rate of 7 would have thrown it out
    assert set(result["test"]["scores"]) >= {"BLEU", "CIDEr"}


def test_prompts_without_room_for_an_answer_are_counted_and_answered_with_nothing(
    llama: Path, tmp_path: Path
) -> None:
    place = boolq(tmp_path / "data")
    rows = json.loads((place / "test.json").read_text())
    rows[1]["instruction"] = "x" * 1000
    (place / "test.json").write_text(json.dumps(rows))
    task = open_task(f"boolq:{place}", None, find_model(str(llama)), {})
    assert any(
        "1 of 6 prompts do not fit into the model's 1024 positions" in note
        for note in task.facts().notes
    )
    assert task.test().right[1] == "0"
    for row in rows:
        row["instruction"] = "x" * 1000
    (place / "test.json").write_text(json.dumps(rows))
    with pytest.raises(weft.WeftError, match="no test prompt fits into the model's 1024 positions"):
        open_task(f"boolq:{place}", None, find_model(str(llama)), {})


def test_what_is_right_is_told_only_where_the_score_is_its_mean(tmp_path: Path) -> None:
    from weft.compare.tasks.generated import _right_answers

    task = find_generation(f"boolq:{boolq(tmp_path / 'data')}").load()
    records = task.eval_records("test")[:3]
    texts = ["the correct answer is false", "false", "no idea"]
    assert (
        _right_answers(task, texts, records, task.scorer(texts, records).scores["accuracy"])
        == "100"
    )
    several = [{**record, "group": group} for record, group in zip(records, "aab", strict=True)]
    assert task.scorer(texts, several).scores["accuracy"] == 0.25  # the mean over two data sets
    assert _right_answers(task, texts, several, 0.25) is None


def test_what_is_wrong_is_said_before_anything_is_trained(llama: Path, tmp_path: Path) -> None:
    data = e2e(tmp_path / "data")
    (tmp_path / "no-test").mkdir()
    (tmp_path / "no-test" / "train.txt").write_text("name : A||A\nname : B||B\n")
    bert = encoder(tmp_path / "bert")
    cases = [
        (
            ("--task", f"e2e:{data}:train=validation"),
            1,
            "'digits-vit' (vit) is no causal language model",
        ),
        (
            ("--task", f"e2e:{data}:train=validation", "--model", str(bert)),
            1,
            "(bert) is no causal language model",
        ),
        (
            ("--task", f"e2e:{data}", "--model", str(llama)),
            1,
            f"can only be evaluated. e2e:{data}:train=validation trains on its",
        ),
        (("--task", f"e2e:{tmp_path / 'no-test'}", "--model", str(llama)), 1, "has no test data"),
        (
            ("--task", f"e2e:{data}:train=test"),
            2,
            "train=test is not known; train=validation trains",
        ),
        (("--task", f"e2e:{data}", "--test", str(data)), 2, "its own test data"),
        (("--task", f"e2e:{data}", "--head-lr", "1e-2"), 2, "no new head"),
        (("--task", "e2", "--model", str(llama)), 2, "'e2' is not known. Nearest: ['e2e:DIR'"),
        (("--warm-up", "1"), 2, "from 0 to below 1"),
        (("--weight-decay", "-1"), 2, "0 or more"),
    ]
    for given, status, said in cases:
        found = weft_command("compare", "--out", str(tmp_path / "out"), *given)
        assert found[0] == status, (given, found)
        assert said in found[2].splitlines()[-1], (given, found)
    assert not (tmp_path / "out" / "sweep.json").exists()


def test_held_out_prompts_are_held_out_with_all_their_answers(tmp_path: Path) -> None:
    task = find_any(f"e2e:{e2e(tmp_path / 'data')}:train=validation").load()
    from weft.tasks.generation import with_validation

    found = with_validation(task)
    assert len(found.samples) == 8 and len(found.records["validation"]) == 1
    held = found.records["validation"][0]
    assert len(held["references"]) == 2 and held["prompt"] not in {
        sample["prompt"] for sample in found.samples
    }
    assert with_validation(found) is found
    with pytest.raises(weft.WeftError, match="remove train=validation"):
        find_any(f"boolq:{boolq(tmp_path / 'boolq')}:train=validation").load()
