"""What a finished comparison leaves: the table, JSON, CSV, pictures, adapters; and that --resume
repeats nothing.
"""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
import torch
from comparing import RUNS, TINY, Finished, compare
from PIL import Image

import weft
from weft.compare.tasks.loop import evaluate
from weft.tasks import find_task
from weft.tasks.models import find_model, prepare

CONTRACT = {
    "method",
    "config",
    "trainable",
    "bytes",
    "score_mean",
    "score_interval",
    "scores",
    "step_ratio",
    "peak_bytes",
    "status",
}
HEAD = 48 * 5 + 5  # the embedded transformer is 48 wide and the task has five classes
BIASES = (
    4 * (4 * 48 + 112 + 48 + 2 * 48) + 48 + 48
)  # of four layers, the patch embedding and the last norm


def test_a_finished_comparison_exits_with_zero(finished: Finished) -> None:
    assert finished.status == 0, finished.errors
    assert len(finished.runs) == RUNS
    assert (
        finished.errors.splitlines()[-1].strip().startswith(f"{RUNS + 2}/{RUNS + 2} ")
    )  # two were measured as well


def test_nothing_that_is_printed_is_wider_than_80_columns(finished: Finished) -> None:
    lines = finished.printed.splitlines()
    own = [line for line in lines if str(finished.out) not in line and not line.startswith("/")]
    assert max(map(len, own)) <= 80
    assert any(line.startswith("LoRA r=3 alpha=5") for line in lines)
    assert any(line.startswith("BitFit") for line in lines)
    assert (finished.out / "table.txt").read_text(encoding="utf-8") in finished.printed


def test_the_table_says_what_the_json_holds(finished: Finished) -> None:
    for row in finished.json["rows"]:
        line = next(
            text for text in finished.printed.splitlines() if text.startswith(row["method"])
        )
        assert f" {row['trainable']:,} " in line
        assert f" {100 * row['score_mean']:.1f} ±" in line
        assert f" {row['step_ratio']:.2f} " in line


def test_json_has_the_contract_s_fields(finished: Finished) -> None:
    data = finished.json
    assert data["schema"] == 1
    assert (data["task"], data["model"]) == ("digits", "digits-vit")
    assert [row["method"] for row in data["rows"]] == ["LoRA r=3 alpha=5", "BitFit"]
    for row in data["rows"]:
        assert set(row) >= CONTRACT
        assert row["status"] == "finished"
        assert len(row["scores"]) == 3
        assert row["score_mean"] == pytest.approx(mean(row["scores"]))
        assert row["score_interval"][0] <= row["score_mean"] <= row["score_interval"][1]
        assert row["step_ratio"] > 0.5
        assert row["peak_bytes"] > 84_228 * 4  # no less than the model itself
    assert set(data["recommendation"]) == {"method", "why"}
    assert "paired t-test" in data["recommendation"]["why"]
    assert json.loads((finished.out.parent / "copy.json").read_text(encoding="utf-8")) == data


def test_the_head_is_counted_apart_from_the_method(finished: Finished) -> None:
    lora, bitfit = finished.json["rows"]
    assert lora["trainable"] == 3 * 4 * (4 * (48 + 48) + 2 * (48 + 112))
    assert bitfit["trainable"] == BIASES
    assert (
        lora["head_trainable"]
        == bitfit["head_trainable"]
        == finished.json["head_trainable"]
        == HEAD
    )
    assert f"which adds {HEAD} to every row" in finished.printed


def test_bytes_are_those_of_the_saved_file(finished: Finished) -> None:
    for row in finished.json["rows"]:
        assert (Path(row["adapter"]) / "adapter_model.safetensors").stat().st_size == row["bytes"]
        assert row["bytes"] > 4 * (row["trainable"] + HEAD)


def test_the_test_split_is_scored_by_final_runs_alone(finished: Finished) -> None:
    runs = finished.runs.values()
    tuning = [run for run in runs if run["spec"]["purpose"] == "tune"]
    final = [run for run in runs if run["spec"]["purpose"] == "final"]
    assert tuning
    assert not any("test" in run for run in tuning)
    assert sorted((run["spec"]["label"], run["spec"]["seed"]) for run in final) == [
        (label, seed) for label in ("BitFit", "LoRA r=3 alpha=5") for seed in range(3)
    ]
    assert not {run["spec"]["seed"] for run in tuning} & {0, 1, 2}


def test_the_rate_is_the_best_on_validation(finished: Finished) -> None:
    bitfit = finished.json["rows"][1]
    best = max(bitfit["lr_validation"].values())
    assert set(bitfit["lr_validation"]) == {"3e-3", "1e-2"}
    assert bitfit["lr_validation"][f"{bitfit['lr']:.0e}".replace("e-0", "e-")] == best


def test_csv_holds_the_rows_of_the_json(finished: Finished) -> None:
    with (finished.out / "results.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    for line, row in zip(lines, finished.json["rows"], strict=True):
        assert line["method"] == row["method"]
        assert [float(line[f"score_seed_{seed}"]) for seed in range(3)] == row["scores"]
        assert (int(line["trainable"]), int(line["bytes"])) == (row["trainable"], row["bytes"])


@pytest.mark.parametrize("name", ["scores.png", "curves.png"])
def test_pictures_are_images_with_something_on_them(finished: Finished, name: str) -> None:
    with Image.open(finished.out / name) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape == (750, 1200, 3)
    for blue_or_vermilion in ((0, 114, 178), (213, 94, 0)):  # the colours of the first two rows
        assert (np.abs(pixels.astype(int) - blue_or_vermilion).sum(axis=2) < 12).sum() > 50


def test_the_saved_adapter_gives_the_score_of_the_first_seed(finished: Finished) -> None:
    row = finished.json["rows"][0]
    prepared = prepare(find_task("digits").load(), find_model("digits-vit"), {"test": 150})
    torch.manual_seed(5)
    # what the file holds must not depend on what was there
    prepared.model.classifier.reset_parameters()
    weft.load(prepared.model, row["adapter"])
    assert evaluate(prepared.model, prepared.splits["test"]).score == row["scores"][0]


def test_an_occupied_directory_is_refused_before_any_compute(finished: Finished) -> None:
    again = compare(finished.out, *TINY)
    assert again.status == 2
    assert again.printed == ""
    assert "--resume" in again.errors
    assert len(again.errors.splitlines()) == 1


def test_resume_with_another_budget_is_refused(finished: Finished) -> None:
    again = compare(finished.out, "--budget", "steps=97", "--resume")
    assert again.status == 2
    assert "steps 96, and this one has 97" in again.errors


def test_resume_trains_nothing_again_and_two_seeds_give_no_ranking(
    finished: Finished, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished.out, copy)
    (copy / "report.html").unlink()
    again = compare(copy, *TINY, "--seeds", "2", "--resume")
    assert again.status == 0, again.errors
    assert again.runs == finished.runs
    assert "No ranking: with 2 seeds" in (copy / "report.html").read_text(encoding="utf-8")
    assert (
        "report.html" in " ".join(again.printed.split()).rpartition(" In ")[2]
    )  # a long path stands on a line of its own
    assert again.json["recommendation"] is None
    assert "2 seeds" in again.json["no_recommendation"]
    assert "No ranking: with 2 seeds" in again.printed
    assert "Recommended" not in again.printed
    for now, before in zip(again.json["rows"], finished.json["rows"], strict=True):
        assert now["scores"] == before["scores"][:2]
        assert (now["step_ratio"], now["peak_bytes"]) == (
            before["step_ratio"],
            before["peak_bytes"],
        )
