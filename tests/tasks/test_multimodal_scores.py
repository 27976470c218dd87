"""The multimodal benchmarks' metrics: golden scores of the authors' tools, small cases by hand, and the
authors' files.
"""

import json

import pytest

from weft import ConfigError, WeftError
from weft.cli import main
from weft.tasks import caption_scores
from weft.tasks.multimodal import SCORERS
from weft.tasks.multimodal.answers import PROTOCOLS, normalised, vqa_accuracy
from weft.tasks.multimodal.choices import chosen_option, stated_letter
from weft.tasks.multimodal.nlvr2 import accuracy_and_consistency
from weft.tasks.multimodal.pope import pope_scores, says_yes
from weft.tasks.scoring import score_files


def written(path, value):
    lines = isinstance(value, list) and path.suffix == ".jsonl"
    text = "".join(json.dumps(row) + "\n" for row in value) if lines else json.dumps(value)
    path.write_text(text if not isinstance(value, str) else value, encoding="utf-8")
    return path


def score(tmp_path, task, references, outputs, names=("r.json", "o.json"), **more):
    given = [written(tmp_path / n, v) for n, v in zip(names, (references, outputs), strict=True)]
    return score_files(task, *given, **more).scores


# --- VQA accuracy --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prediction", "answers", "wanted"),
    [  # official, vl-adapter, textvqa; run with the three tools (facts of the project)
        ("two", {"2": 10}, (0, 100, 100)),
        ("Yes", {"yes": 10}, (0, 100, 100)),
        ("2", {"2": 7, "two": 3}, (100, 100, 100)),
        ("dog", {"cat": 7, "dog": 3}, (90, 90, 90)),
        ("dog", {"cat": 8, "dog": 2}, (60, 60, 60)),
        ("dog", {"cat": 9, "dog": 1}, (30, 30, 30)),
        ("black/white", {"black and white": 5, "black white": 5}, (100, 100, 100)),
        ("", {"yes": 9, "no": 1}, (0, 0, 0)),
    ],
)
def test_the_three_protocols_differ_where_their_tools_do(prediction, answers, wanted):
    listed = [answer for answer, n in answers.items() for _ in range(n)]
    found = [100 * vqa_accuracy(prediction, listed, protocol) for protocol in PROTOCOLS]
    assert found == pytest.approx(wanted)
    again = [100 * vqa_accuracy(prediction, listed, protocol) for protocol in PROTOCOLS]
    assert again == found  # pure: VL-Adapter's tool changes its answers while it scores


def test_golden_vqa_scores_of_the_tools(shared):
    cases = json.loads((shared / "facts" / "vqa_golden.json").read_text())
    for case in cases:
        listed = [answer for answer, n in case["answers"].items() for _ in range(n)]
        for protocol in PROTOCOLS:
            found = 100 * vqa_accuracy(case["prediction"], listed, protocol)
            assert found == pytest.approx(case[protocol.replace("-", "_")]), (case, protocol)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("The  Dogs.", "dogs"),
        ("it isnt 1,000 men", "it isn't 1000 men"),
        ("an apple, or none", "apple or 0"),
        ("couldnt've", "couldn't've"),
        ("well shed its tail", "well shed its tail"),  # words of their own stay
        ("somebody'd", "somebodyd"),
        ("3.5", "3.5"),
        ("Im here", "im here"),  # the official table has it with a capital and never finds it
    ],
)
def test_answers_are_normalised_as_the_tools_do(text, wanted):
    assert normalised(text) == wanted


def test_a_question_without_answers_is_an_error():
    with pytest.raises(ValueError, match="no answer"):
        vqa_accuracy("yes", [])


ANNOTATIONS = {
    "annotations": [
        {"question_id": 1, "answer_type": "other", "answers": [{"answer": "2"}] * 10},
        {"question_id": 2, "answer_type": "yes/no", "answers": [{"answer": "yes"}] * 10},
    ]
}


def test_vqa_files_of_the_authors(tmp_path):
    results = [{"question_id": 2, "answer": "yes"}, {"question_id": 1, "answer": "two"}]
    found = score(tmp_path, "vqav2", ANNOTATIONS, results)
    assert found == {"accuracy": 50.0, "accuracy, other": 0.0, "accuracy, yes/no": 100.0}
    found = score(tmp_path, "vqav2", ANNOTATIONS, results, protocol="vl-adapter")
    assert found["accuracy"] == 100.0
    textvqa = {"data": [{"question_id": 7, "answers": ["Stop!"] * 10}]}
    lines = [{"question_id": 7, "text": "stop"}]
    assert score(tmp_path, "textvqa", textvqa, lines, ("r.json", "o.jsonl")) == {"accuracy": 100.0}
    vizwiz = [{"image": "a.jpg", "answers": [{"answer": "unanswerable"}] * 10}]
    assert score(tmp_path, "vizwiz", vizwiz, [{"image": "a.jpg", "answer": "Unanswerable"}]) == {
        "accuracy": 100.0
    }


@pytest.mark.parametrize(
    ("results", "said"),
    [
        (
            [{"question_id": 1, "answer": "a"}],
            r"no output for 1 of the 2 ids in .*r.json, '2' first",
        ),
        (
            [{"question_id": n, "answer": "a"} for n in (1, 2, 3)],
            r"outputs for 1 ids that are not in .*, '3' first",
        ),
        ([{"question_id": 1, "answer": "a"}] * 2, r"entry 2: the id '1' is given twice"),
        ([{"question": 1, "answer": "a"}], r"entry 1 has no 'question_id' or 'image'; its fields"),
        ([{"question_id": n, "answer": n} for n in (1, 2)], r"id '1': the output 1 is no text"),
        ([1], r"entry 1: 1 is not an object"),
        ("[{", r"o.json, line 1: no JSON"),
    ],
)
def test_an_output_too_few_too_many_or_unreadable_is_an_error(tmp_path, results, said):
    with pytest.raises(WeftError, match=said):
        score(tmp_path, "vqav2", ANNOTATIONS, results)


def test_a_protocol_belongs_to_vqa_alone(tmp_path):
    with pytest.raises(ConfigError, match="--protocol is the rule of VQA accuracy"):
        score(tmp_path, "gqa", {}, [], protocol="official")


# --- the others ----------------------------------------------------------------------------------


def test_gqa(tmp_path):
    questions = {"7": {"answer": "left"}, "8": {"answer": "no"}}
    results = [{"questionId": "7", "prediction": "Left."}, {"questionId": "8", "prediction": "yes"}]
    assert score(tmp_path, "gqa", questions, results) == {"accuracy": 50.0}
    vl_adapter = [{"question_id": "7", "img_id": "1", "label": {"left": 1.0}, "sent": "where?"}]
    lines = [{"question_id": "7", "text": "left"}]
    assert score(tmp_path, "gqa", vl_adapter, lines, ("r.json", "o.jsonl")) == {"accuracy": 100.0}


def test_nlvr2_consistency_is_of_sentences(tmp_path):
    right = {"t-1-0-0": True, "t-1-1-0": True, "t-1-0-1": True, "t-1-1-1": False}
    assert accuracy_and_consistency(right) == (0.75, 0.5)
    labels = [{"identifier": name, "label": "True"} for name in right]
    table = "identifier,prediction\n" + "".join(f"{n},{v}\n" for n, v in right.items())
    wanted = {"accuracy": 0.75, "consistency": 0.5}
    assert score(tmp_path, "nlvr2", labels, table, ("r.jsonl", "o.csv")) == wanted
    assert score(tmp_path, "nlvr2", labels, right, ("r.jsonl", "o.json")) == wanted
    with pytest.raises(WeftError, match="id 't-1-0-0': 'maybe' is neither True nor False"):
        score(tmp_path, "nlvr2", labels, right | {"t-1-0-0": "maybe"}, ("r.jsonl", "o.json"))


def test_pope_always_yes(tmp_path):
    assert says_yes("Yes, there is.") and not says_yes("There is not, I think")
    assert says_yes("It is red. No dog.") and says_yes("None")
    labels = [True, False] * 1500
    found = pope_scores(["Yes"] * 3000, labels)
    assert found["accuracy"] == 0.5 and found["F1"] == pytest.approx(2 / 3)
    assert found["recall"] == found["yes"] == 1.0
    assert pope_scores(["no"], [False])["F1"] is None
    for folder in ("r", "o"):
        (tmp_path / folder).mkdir()
    for part in ("random", "popular", "adversarial"):
        rows = [{"question_id": n, "label": ("no", "yes")[n % 2]} for n in range(6)]
        written(tmp_path / "r" / f"coco_pope_{part}.json", "\n".join(map(json.dumps, rows)))
        said = [{"question_id": n, "text": "yes"} for n in range(6)]
        written(tmp_path / "o" / f"coco_pope_{part}.jsonl", said)
    scores = score_files("pope", tmp_path / "r", tmp_path / "o").scores
    assert scores["accuracy"] == 0.5 and scores["F1"] == pytest.approx(0.6667, abs=1e-4)
    (tmp_path / "o" / "coco_pope_random.jsonl").unlink()
    with pytest.raises(WeftError, match=r"give a folder with outputs named coco_pope_random\.json"):
        score_files("pope", tmp_path / "r", tmp_path / "o")


@pytest.mark.parametrize(
    ("output", "letter"),
    [
        ("B", "B"),
        (" B ", "B"),
        ("B. a cat", "B"),
        ("The answer is C.", "C"),
        ("b", None),
        ("", None),
    ],
)
def test_the_letter_that_an_output_states(output, letter):
    assert stated_letter(output) == letter


def test_scienceqa_counts_images_apart(tmp_path):
    problems = {
        "1": {"answer": 0, "choices": ["a", "b"], "image": "image.png"},
        "2": {"answer": 1, "choices": ["a", "b"], "image": None},
        "3": {"answer": 1, "choices": ["a", "b"], "image": None},
    }
    lines = [{"question_id": n, "text": t} for n, t in (("1", "A"), ("2", "A"))]
    written(tmp_path / "pid_splits.json", {"test": ["1", "2"], "train": ["3"]})
    found = score(tmp_path, "scienceqa", problems, lines, ("problems.json", "o.jsonl"))
    assert found == {"accuracy": 50.0, "accuracy, images": 100.0}


OPTIONS = {"A": "a red cup", "B": "a blue cup"}


@pytest.mark.parametrize(
    ("output", "wanted"),
    [
        ("A", "A"),
        ("(B)", "B"),
        ("It is a blue cup", "B"),
        ("A or B", None),
        ("A thing that nobody has seen before", None),
        ("Cannot determine the answer, A", None),
    ],
)
def test_the_option_that_an_output_chooses(output, wanted):
    assert chosen_option(output, OPTIONS) == wanted


def test_mmbench_is_circular(tmp_path):
    rows = [(1, "x", "y", "A"), (1_000_001, "y", "x", "B"), (2, "x", "y", "B")]
    table = "index\tA\tB\tanswer\n" + "".join("\t".join(map(str, row)) + "\n" for row in rows)
    said = [{"index": i, "prediction": p} for i, p in ((1, "A"), (1_000_001, "A"), (2, "B"))]
    names = ("r.tsv", "o.jsonl")
    assert score(tmp_path, "mmbench", table, said, names) == {"accuracy": 50.0}
    said[1]["prediction"] = "x"  # the option's text
    assert score(tmp_path, "mmbench", table, said, names) == {"accuracy": 100.0}


def test_indices_of_value(tmp_path):
    rows = [{"qid": 5, "answer_idx": 2}, {"qid": 6, "answer_idx": 0}]
    names = ("r.jsonl", "o.json")
    assert score(tmp_path, "tvqa", rows, {"5": 2, "6": 1}, names) == {"accuracy": 50.0}
    with pytest.raises(WeftError, match="id '5': 'a2' is no index"):
        score(tmp_path, "tvqa", rows, {"5": "a2", "6": 1}, names)


CLIPS = [
    {"clip_id": 1, "descs": [{"desc": "cut the cucumber"}, {"desc": "slice a cucumber"}]},
    {"clip_id": 2, "descs": [{"desc": "stir the pan"}]},
]


def test_captions_of_images_and_clips_are_one_metric(tmp_path, monkeypatch):
    pytest.importorskip("pycocoevalcap")
    monkeypatch.setattr(caption_scores, "has_java", lambda: False)  # it takes seconds to start
    said = [{"clip_id": n, "descs": [{"desc": d}]} for n, d in ((1, "cut a cucumber"), (2, "stir"))]
    clips = score(tmp_path, "yc2c", CLIPS, said, ("r.jsonl", "o.jsonl"))
    annotations = {
        "annotations": [
            {"image_id": row["clip_id"], "caption": one["desc"]}
            for row in CLIPS
            for one in row["descs"]
        ]
    }
    outputs = [{"image_id": row["clip_id"], "caption": row["descs"][0]["desc"]} for row in said]
    coco = score(tmp_path, "coco-caption", annotations, outputs)
    assert clips["CIDEr"] == pytest.approx(100 * coco["CIDEr"]) and coco["BLEU-1"] > 0
    karpathy = {
        "images": [
            {
                "cocoid": r["clip_id"],
                "split": "test",
                "sentences": [{"raw": d["desc"]} for d in r["descs"]],
            }
            for r in CLIPS
        ]
        + [{"cocoid": 9, "split": "train", "sentences": [{"raw": "no"}]}]
    }
    assert score(tmp_path, "coco-caption", karpathy, outputs) == coco


@pytest.mark.parametrize(
    ("task", "wanted"),
    [
        ("how2qa", {"accuracy": 73.13}),
        pytest.param(
            "yc2c", {"BLEU-4": 10.71, "ROUGE-L": 38.74, "CIDEr": 115.88}, marks=pytest.mark.slow
        ),
    ],
)
def test_golden_scores_of_value(shared, capsys, tmp_path, task, wanted):
    if task == "yc2c":
        pytest.importorskip("pycocoevalcap")
    place = shared / "data" / "datasets" / "VALUE"
    (outputs,) = place.glob(f"{task}_val_predictions*")
    given = ["--references", str(place / f"{task}_val_release.jsonl.gz"), "--outputs", str(outputs)]
    assert main(["score", "--task", task, *given, "--json", str(tmp_path / "s.json")]) == 0
    found = json.loads((tmp_path / "s.json").read_text())["scores"]
    for metric, value in wanted.items():
        assert found[metric] == pytest.approx(value, abs=0.006), metric


def test_every_benchmark_of_the_paper_has_a_scorer():
    assert set(SCORERS) == {
        "vqav2", "gqa", "nlvr2", "coco-caption",  # image and text
        "tvqa", "how2qa", "tvc", "yc2c",  # video and text
        "vizwiz", "scienceqa", "textvqa", "pope", "mmbench",  # visual instruction tuning
    }  # fmt: skip
