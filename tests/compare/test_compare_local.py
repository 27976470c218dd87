"""`weft compare` with a local transformers directory: text from a CSV file, images from folders."""

from __future__ import annotations

import csv
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from comparing import compare, weft_command
from PIL import Image

WORDS = {
    "good": ["fine", "lovely", "bright"],
    "bad": ["dull", "grim", "broken"],
    "odd": ["queer", "strange", "weird"],
}
FILL = ["the", "film", "was", "and", "so", "very", "plot"]


def _bert(folder: Path) -> Path:
    """A BERT of one thin layer as masked-language training leaves it, and a tokenizer that knows
    the words above.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

    names = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        *FILL,
        *(word for words in WORDS.values() for word in words),
    ]
    tokenizer = Tokenizer(
        models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    ).save_pretrained(folder)
    BertForMaskedLM(
        BertConfig(
            vocab_size=len(names),
            hidden_size=12,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=20,
            max_position_embeddings=16,
            initializer_range=0.2,
        )
    ).save_pretrained(folder)
    return folder


def _table(path: Path, each: int, seed: int) -> Path:
    draw = random.Random(seed)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["label", "text"])
        for label, words in WORDS.items():
            writer.writerows(
                [label, ", ".join([*draw.sample(FILL, 3), draw.choice(words)])] for _ in range(each)
            )
    return path


def test_text_classification_from_a_csv_file_and_a_local_bert(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = _bert(tmp_path / "bert")
    train, test = _table(tmp_path / "train.csv", 16, 1), _table(tmp_path / "test.csv", 5, 2)
    done = compare(
        tmp_path / "out",
        "--model",
        str(model),
        "--task",
        f"csv:{train}",
        "--test",
        str(test),
        "--methods",
        "dora:r=2,full",
        "--lr",
        "dora=1e-2",
        "--lr",
        "full=1e-2",
        "--seeds",
        "1",
        "--workers",
        "1",
        "--budget",
        "steps=60,batch=50",
        "--head-lr",
        "2e-2",
    )
    assert done.status == 0, done.errors
    assert done.json["classes"] == ["bad", "good", "odd"]
    assert done.json["examples"] == {"train": 36, "validation": 12, "test": 15}
    assert set(done.json["head"]) == {
        "classifier",
        "bert.pooler.dense",
    }  # the file has no tensors for the two
    assert any("test is --test" in note for note in done.json["notes"])
    assert "A step has 36 examples instead of 50" in " ".join(done.printed.split())
    dora, full = done.json["rows"]
    assert full["scores"][0] > 0.5  # chance is a third
    assert full["score_interval"] is None
    assert dora["trainable"] == 2 * (4 * (12 + 12) + 2 * (12 + 20)) + 5 * 12 + 20
    assert dora["head_trainable"] == full["head_trainable"] == 12 * 3 + 3 + 12 * 12 + 12
    assert done.json["recommendation"] is None


def _vit(folder: Path) -> Path:
    from transformers import ViTConfig, ViTForImageClassification

    ViTForImageClassification(
        ViTConfig(
            image_size=6,
            patch_size=3,
            hidden_size=12,
            num_hidden_layers=1,
            num_channels=3,
            num_attention_heads=2,
            intermediate_size=20,
            initializer_range=0.3,
        )
    ).save_pretrained(folder)
    return folder


def _images(folder: Path, each: int) -> Path:
    draw = np.random.default_rng(0)
    for name, rows in (("above", slice(0, 5)), ("below", slice(5, 10))):
        (folder / name).mkdir(parents=True)
        for i in range(each):
            pixels = draw.integers(0, 60, (10, 14, 3), dtype=np.uint8)
            pixels[rows] += 190
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def test_image_folders_with_a_row_that_fails_beside_one_that_does_not(tmp_path: Path) -> None:
    torch.manual_seed(0)
    done = compare(
        tmp_path / "out",
        "--model",
        str(_vit(tmp_path / "vit")),
        "--workers",
        "1",
        "--task",
        f"image-folder:{_images(tmp_path / 'pictures', 10)}",
        "--methods",
        "head,lora:r=2",
        "--lr",
        "lora=1e30",
        "--lr",
        "head=1e-1",
        "--budget",
        "steps=20,batch=6",
    )
    head, lora = done.json["rows"]
    assert done.status == 1
    assert (head["status"], lora["status"]) == ("finished", "failed")
    assert head["score_mean"] > 0.7
    assert head["trainable"] == 0
    assert "DivergedError" in lora["reason"]
    assert (lora["scores"], lora["score_mean"], lora["step_ratio"]) == ([None] * 3, None, None)
    line = next(text for text in done.printed.splitlines() if text.startswith("LoRA r=2"))
    assert " failed " in line
    assert "LoRA r=2 failed: every learning rate failed" in done.printed
    assert "No ranking: only 1 of 2 rows has all scores." in done.printed
    assert "resized (bilinear) to 6 x 6" in " ".join(done.printed.split())


def test_a_model_that_cannot_be_loaded_exits_with_one_and_leaves_the_place_free(
    tmp_path: Path,
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    words = ("compare", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "out"))
    status, printed, errors = weft_command(*words)
    assert (status, printed) == (1, "")
    assert "could not be loaded from its directory" in errors.splitlines()[-1]
    assert not (tmp_path / "out" / "study.db").exists()


@pytest.mark.slow
def test_an_image_set_with_two_images_a_class(tmp_path: Path) -> None:
    torch.manual_seed(0)
    draw = np.random.default_rng(0)
    for name in (f"scene{i:02d}" for i in range(45)):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(5):
            Image.fromarray(draw.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(
                tmp_path / "data" / name / f"{i}.jpg"
            )
    task = f"resisc45:{tmp_path / 'data'}:per_class=2"
    words = (
        "--model",
        str(_vit(tmp_path / "vit")),
        "--workers",
        "1",
        "--methods",
        "lora:r=2",
        "--lr",
        "lora=1e-2",
        "--seeds",
        "1",
        "--budget",
        "steps=8,batch=6",
    )
    done = compare(tmp_path / "out", *words, "--task", task)
    assert done.status == 0, done.errors
    assert done.json["task"] == task
    assert done.json["examples"] == {"train": 90, "validation": 90, "test": 45}
    assert len(done.json["classes"]) == 45
    assert any(
        "2 images of each class" in note and "all other images" in note
        for note in done.json["notes"]
    )
