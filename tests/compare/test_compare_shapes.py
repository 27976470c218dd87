"""The embedded world of shapes: the packaged model, its tasks, and a comparison."""

import json
import random

import pytest
import torch

import weft
from weft import ConfigError, WeftError
from weft.cli import main
from weft.compare.tasks.open_task import open_task
from weft.tasks import SHAPES, find_any
from weft.tasks.models import EMBEDDED, find_model
from weft.tasks.shapes.examples import examples
from weft.tasks.shapes.language import question
from weft.tasks.shapes.scores import SCORERS, most_frequent
from weft.tasks.shapes.tower import cell_boxes, features, load_tower
from weft.tasks.shapes.world import KNOWN, draw, new_scene

pytest.importorskip("transformers")
SMALL = {"train": 40, "validation": 20, "test": 30}
MODEL = "shapes-vl-bart"


@pytest.mark.parametrize("task", SHAPES)
def test_labels_are_the_answers_and_the_model_sees_all_images(task):
    opened = open_task(task, None, find_model(MODEL), SMALL)
    given = examples(task, "train", SMALL["train"])
    rows = torch.tensor([3, 0, 7])
    inputs, labels = opened.train.batch(rows), opened.train.wanted(rows)
    assert inputs["decoder_input_ids"].shape == labels.shape
    for row, at in enumerate(rows.tolist()):
        said = opened.tokenizer.decode(labels[row][labels[row] >= 0], skip_special_tokens=True)
        assert said == given[at].target
        read = opened.tokenizer.decode(inputs["input_ids"][row], skip_special_tokens=True)
        assert read == given[at].text and "<unk>" not in opened.tokenizer.decode(
            inputs["input_ids"][row]
        )
    images, regions = inputs["vis_feats"].shape[1:3]
    scenes = len(given[0].scenes)
    assert images * regions == 9 * scenes and images == (2 if task == "shapes-nlvr" else 1)
    facts = opened.facts()
    assert facts.sizes == SMALL and facts.lowest
    assert (
        facts.fingerprints == open_task(task, None, find_model(MODEL), SMALL).facts().fingerprints
    )
    assert len({facts.fingerprints[split] for split in SMALL}) == 3


def test_splits_share_no_example_and_a_larger_one_begins_with_a_smaller():
    for task in SHAPES:
        train, test = examples(task, "train", 50), examples(task, "test", 50)
        assert examples(task, "train", 20) == train[:20]
        assert not {repr(e) for e in train} & {repr(e) for e in test}


@torch.no_grad()
def test_the_packaged_model_answers_what_it_was_trained_on():
    opened = open_task("shapes-vqa", None, find_model(MODEL), SMALL)
    rng = random.Random("of the tests")
    scenes = [new_scene(rng, KNOWN) for _ in range(200)]
    asked = [question(scene, rng, KNOWN, ("colour", "exists")) for scene in scenes]
    tower = load_tower(EMBEDDED[MODEL])
    given = opened.tokenizer([f"vqa: {q.text}" for q in asked], padding=True, return_tensors="pt")
    out = opened.model.generate(
        input_ids=given["input_ids"],
        attention_mask=given["attention_mask"],
        vis_feats=features(tower, [draw(s, rng) for s in scenes]).unsqueeze(1),
        vis_boxes=cell_boxes().expand(len(scenes), 1, -1, -1),
        max_new_tokens=4,
        do_sample=False,
        num_beams=1,
    )
    said = opened.tokenizer.batch_decode(out, skip_special_tokens=True)
    assert sum(a == q.answer for a, q in zip(said, asked, strict=True)) >= 198


def test_answers_that_ignore_the_image_are_far_from_right():
    for task, below in (("shapes-vqa", 0.65), ("shapes-nlvr", 0.7), ("shapes-video", 0.5)):
        asked = examples(task, "test", 300)
        score, _ = SCORERS[task](most_frequent(asked), asked)
        assert score < below
        perfect, _ = SCORERS[task]([e.target for e in asked], asked)
        assert perfect > 0.97


def test_compare_runs_on_it_without_a_model_and_offline(tmp_path, capsys):
    words = ["--task", "shapes-nlvr", "--methods", "lora,bitfit", "--seeds", "2"]
    budget = "steps=3,batch=8,train=40,validation=20,test=30"
    out = ["--out", str(tmp_path / "out"), "--json", str(tmp_path / "c.json"), "--workers", "1"]
    assert (
        main(
            [
                "compare",
                *words,
                "--lr",
                "lora=1e-3",
                "--lr",
                "bitfit=1e-3",
                "--budget",
                budget,
                *out,
            ]
        )
        == 0
    )
    found = json.loads((tmp_path / "c.json").read_text())
    assert found["model"] == MODEL
    assert [row["status"] for row in found["rows"]] == ["finished"] * len(found["rows"])


def test_another_model_or_a_path_is_refused(tmp_path):
    with pytest.raises(WeftError, match=r"no VL-BART.*--model shapes-vl-bart"):
        open_task("shapes-vqa", None, find_model("digits-vit"), SMALL)
    with pytest.raises(ConfigError, match="is built in; it accepts no path"):
        find_any("shapes-vqa:/tmp")
    with pytest.raises(ConfigError, match="accepts no other test data"):
        find_any("shapes-vqa", "more.csv")
    opened = open_task("shapes-vqa", None, find_model(MODEL), SMALL)
    opened.model.save_pretrained(tmp_path)
    opened.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(WeftError, match=r"there is no tower\.safetensors"):
        open_task("shapes-vqa", None, find_model(str(tmp_path)), SMALL)
    assert weft.attach(opened.model, weft.DoRA(r=2)).num_parameters
