"""Generation tasks from the files that people have: splits, prompts, references, decoding,
metric.
"""

import json

import pytest

import weft
from weft.tasks import (
    COMMONSENSE,
    GENERATION,
    commonsense,
    e2e,
    find_generation,
    find_task,
    wikisql,
)
from weft.tasks.files import hub_rows, read_rows


def write(path, rows, kind="jsonl"):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(rows) if kind == "json" else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")


@pytest.fixture
def folder(tmp_path):
    """A tiny folder for every generation task, in the authors' layout."""
    e = tmp_path / "e2e"
    e.mkdir()
    train = '"name[The Mill], priceRange[£20-25], familyFriendly[no]",The Mill costs £20-25.\n'
    dev = "name[A],A is the one to see.\nname[B],B is not far off.\nname[A],Go and see A soon.\n"
    (e / "trainset.csv").write_text(f"mr,ref\n{train}", encoding="utf-8")
    (e / "devset.csv").write_text(f"mr,ref\n{dev}")
    (e / "test.txt").write_text(
        "name : C | Type : pub||C is a pub .\nname : C | Type : pub||A pub is C .\n"
    )
    for split in ("train", "val", "test"):
        chat = {"id": "1", "dialogue": "Al: hi\r\nBo: yo", "summary": f"{split} they greet"}
        write(tmp_path / "samsum" / f"{split}.json", [chat], "json")
    for split in ("train", "dev"):
        write(
            tmp_path / "wikisql" / f"{split}.jsonl",
            [
                {
                    "question": "How  many?",
                    "table_id": "t",
                    "sql": {"sel": 1, "agg": 3, "conds": [[0, 0, "x"]]},
                }
            ],
        )
        write(
            tmp_path / "wikisql" / f"{split}.tables.jsonl",
            [{"id": "t", "header": ["A", "B"], "types": ["text", "real"]}],
        )
    asked = {
        "boolq": "false",
        "piqa": "solution2",
        "social_i_qa": "answer3",
        "hellaswag": "ending4",
        "winogrande": "option1",
        "ARC-Easy": "answer4",
        "ARC-Challenge": "answer1",
        "openbookqa": "answer2",
    }
    for name, answer in asked.items():
        row = {
            "instruction": f"Say {answer}",
            "input": "",
            "output": f"the correct answer is {answer}",
            "answer": answer,
        }
        for split in ("train", "test"):
            write(tmp_path / "commonsense" / name / f"{split}.json", [row], "json")
        write(
            tmp_path
            / {
                "social_i_qa": "siqa",
                "ARC-Easy": "arc-e",
                "ARC-Challenge": "arc-c",
                "openbookqa": "obqa",
            }.get(name, name)
            / "test.json",
            [row],
            "json",
        )
    return tmp_path


@pytest.mark.parametrize("name", [family.partition(":")[0] for family in GENERATION])
def test_right_answers_score_highest_and_the_main_metric_is_there(folder, name, monkeypatch):
    monkeypatch.setattr("weft.tasks.caption_scores.has_java", lambda: False)
    task = find_generation(f"{name}:{folder / name}").load()
    assert task.records
    for split in task.records:
        records = task.eval_records(split)
        assert all(record["references"] and record["prompt"] for record in records)
        best = task.metrics([record["references"][0] for record in records], split)
        assert best[task.main_metric] == pytest.approx(1.0)
        assert task.metrics(["?"] * len(records), split)[task.main_metric] < 1e-3
        with pytest.raises(
            weft.WeftError, match=f"{len(records) + 1} outputs for {len(records)} records"
        ):
            task.metrics(["?"] * (len(records) + 1), split)
    with pytest.raises(weft.ConfigError, match="has no split 'dev'"):
        task.eval_records("dev")
    from transformers import GenerationConfig

    assert GenerationConfig(**task.generation).validate(strict=True) is None
    if task.samples:
        assert all(
            set(sample) == {"prompt", "completion"} and sample["completion"]
            for sample in task.train_samples()
        )
    else:
        with pytest.raises(weft.WeftError, match="no training data"):
            task.train_samples()


def test_e2e_has_one_record_a_meaning_and_one_form_of_prompt(folder):
    task = find_generation(f"e2e:{folder / 'e2e'}").load()
    assert task.train_samples() == [
        {
            "prompt": "name : The Mill | price : £ 20 - 25 | family friendly : no\n",
            "completion": "The Mill costs £20-25.",
        }
    ]
    assert task.eval_records("validation") == [
        {"prompt": "name : A\n", "references": ["A is the one to see.", "Go and see A soon."]},
        {"prompt": "name : B\n", "references": ["B is not far off."]},
    ]
    assert task.eval_records("test") == [
        {"prompt": "name : C | Type : pub\n", "references": ["C is a pub .", "A pub is C ."]}
    ]
    assert task.generation == {
        "num_beams": 10,
        "length_penalty": 0.9,
        "no_repeat_ngram_size": 4,
        "repetition_penalty": 1.0,
        "max_new_tokens": 64,
        "do_sample": False,
    }


@pytest.mark.shared
def test_the_e2e_files_have_the_papers_numbers_of_meanings(shared):
    task = find_generation(f"e2e:{shared / 'data' / 'datasets' / 'E2E'}").load()
    assert {split: len(records) for split, records in task.records.items()} == {
        "validation": 547,
        "test": 630,
    }
    assert sum(len(record["references"]) for record in task.eval_records("test")) == 4693


def test_samsum_and_wikisql_prompts(folder):
    samsum = find_generation(f"samsum:{folder / 'samsum'}").load()
    assert samsum.train_samples() == [
        {"prompt": "Al: hi\nBo: yo\n\n", "completion": "train they greet"}
    ]
    task = find_generation(f"wikisql:{folder / 'wikisql'}").load()
    assert task.train_samples() == [
        {
            "prompt": 'Table: "A" (text), "B" (real)\nQuestion: How many?\nSQL: ',
            "completion": 'SELECT COUNT "B" FROM table WHERE "A" = \'x\'',
        }
    ]


def test_wikisql_rows_of_the_hub_are_the_same_queries():
    sql = {
        "sel": 1,
        "agg": 3,
        "human_readable": "...",
        "conds": {"column_index": [0], "operator_index": [2], "condition": ["x"]},
    }
    assert wikisql.render(sql, ["A", "B"]) == 'SELECT COUNT "B" FROM table WHERE "A" < \'x\''
    for wrong in (
        {"sel": 2, "agg": 0, "conds": []},
        {"sel": -1, "agg": 0, "conds": []},
        {"agg": 0, "conds": []},
        {"sel": 0, "agg": 6, "conds": []},
        {"sel": 0, "agg": 0, "conds": [[0, 0]]},
    ):
        with pytest.raises(weft.WeftError, match="is not a query on 2 columns"):
            wikisql.render(wrong, ["A", "B"])


def test_the_commonsense_prompt_is_the_papers_to_the_letter():
    assert commonsense.instruction_prompt("Q?") == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request. \n\n"
        "                ### Instruction:\n                Q?\n\n                ### Response:\n   "
        "             "
    )
    assert "\n                ### Input:\n                C\n\n" in commonsense.instruction_prompt(
        "Q?", "C"
    )


RAW = {
    "boolq": ({"question": "is it so", "answer": False, "passage": "..."}, "false"),
    "piqa": ({"goal": "G", "sol1": "S", "sol2": "T", "label": 1}, "solution2"),
    "siqa": (
        {
            "context": "C.",
            "question": "Q?",
            "answerA": "1",
            "answerB": "2",
            "answerC": "3",
            "label": "3",
        },
        "answer3",
    ),
    "hellaswag": (
        {"activity_label": "L", "ctx": "c", "endings": ["1", "2", "3", "4"], "label": "3"},
        "ending4",
    ),
    "winogrande": ({"sentence": "S _", "option1": "1", "option2": "2", "answer": "2"}, "option2"),
    "arc-e": (
        {"question": "Q?", "choices": {"text": ["1", "2"], "label": ["A", "B"]}, "answerKey": "B"},
        "answer2",
    ),
    "arc-c": (
        {"question": "Q?", "choices": {"text": ["1", "2"], "label": ["1", "2"]}, "answerKey": "1"},
        "answer1",
    ),
    "obqa": (
        {
            "question_stem": "Q",
            "choices": {"text": ["1", "2"], "label": ["A", "B"]},
            "answerKey": "A",
        },
        "answer1",
    ),
}


@pytest.mark.parametrize("name", COMMONSENSE[1:])
def test_a_row_as_published_becomes_an_instruction(tmp_path, name):
    row, answer = RAW[name]
    write(tmp_path / "test.jsonl", [row])
    record = find_generation(f"{name}:{tmp_path}").load().eval_records("test")[0]
    assert record["references"] == [answer]
    assert f"Answer format: {'true/false' if name == 'boolq' else answer[:-1]}" in record["prompt"]


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "word"),
    [("piqa", "Solution"), ("siqa", "Answer"), ("winogrande", "Option"), ("arc-e", "Answer")],
)
def test_a_rendered_row_has_the_shape_of_llm_adapters_files(shared, name, word):
    """Take an instruction apart and render it again: only the words between the marks may
    differ.
    """
    import re

    place = shared / "data" / "datasets" / "COMMONSENSE" / commonsense.SETS[name][0]
    for row in read_rows(place / "test.json.gz")[:50]:
        asked = row["instruction"]
        options = re.findall(
            rf"{word}\d: (.*?)(?=\s*{word}\d: |\s*Answer format: )", asked, re.DOTALL
        )
        stem = re.match(rf"(?:.*?: )(.*?)\n\n{word}1: ", asked, re.DOTALL)[1]
        lettered = dict(zip(("answerA", "answerB", "answerC"), options, strict=False))
        raw = {
            "piqa": {"goal": stem, "sol1": options[0], "sol2": options[1], "label": 0},
            "siqa": {"context": stem, "question": "", **lettered, "label": 1},
            "winogrande": {
                "sentence": stem,
                "option1": options[0],
                "option2": options[1],
                "answer": 1,
            },
            "arc-e": {
                "question": stem,
                "choices": {"text": options, "label": [str(i) for i in range(len(options))]},
                "answerKey": "0",
            },
        }[name]
        assert commonsense.RENDER[name](raw)[0].split() == asked.split()


@pytest.mark.shared
def test_the_commonsense_files_have_the_papers_numbers_of_questions(shared):
    task = find_generation(f"commonsense:{shared / 'data' / 'datasets' / 'COMMONSENSE'}").load()
    groups = [record["group"] for record in task.eval_records("test")]
    assert {name: groups.count(name) for name in set(groups)} == {
        "boolq": 3270,
        "piqa": 1838,
        "siqa": 1954,
        "winogrande": 1267,
        "arc-e": 2376,
        "arc-c": 1172,
        "obqa": 500,
    }
    assert "hellaswag" in task.notes[0]
    assert len(task.eval_records("validation")) == 120
    held = {record["prompt"] for record in task.eval_records("validation")}
    assert len(task.train_samples()) == 9427 + 4957 + 2251 + 1119 - 120
    assert (
        sum(sample["prompt"] in held for sample in task.train_samples()) < 5
    )  # a few questions stand there twice


def test_the_merged_training_file_is_used_where_it_is_there(folder):
    rows = [
        {"instruction": str(i), "input": "", "output": "", "answer": "true"} for i in range(1300)
    ]
    write(folder / "commonsense" / "commonsense_170k.json", rows, "json")
    task = find_generation(f"commonsense:{folder / 'commonsense'}").load()
    assert len(task.train_samples()) == 1300 - 120 and len(task.eval_records("validation")) == 120
    assert task.train_samples()[0]["completion"] == "the correct answer is true"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("e2:x", "Nearest.*e2e:DIR"),
        ("e2e:./nowhere", "must be a folder; it does not exist"),
        ("sst2:x", "is classification"),
        ("commonsense:a/b", "all eight"),
        ("samsum:nowhere", "must be a folder"),
    ],
)
def test_a_wrong_task_is_refused_before_anything_is_read(name, said):
    with pytest.raises(weft.ConfigError, match=said):
        find_generation(name)


def test_a_generation_task_is_no_classification():
    with pytest.raises(weft.ConfigError, match="is text to generate"):
        find_task("e2e:x")


@pytest.mark.parametrize(
    ("name", "file", "text", "said"),
    [
        ("e2e", "other.csv", "x", "has none of trainset"),
        ("e2e", "devset.csv", "mr,ref\nname[A]\n", "line 2: the number of fields is not 2"),
        (
            "e2e",
            "devset.csv",
            "mr,text\nname[A],x\n",
            r"row 1: \['ref'\] is missing; it has \['mr', 'text'\]",
        ),
        ("e2e", "devset.csv", "mr,ref\n", "no rows"),
        ("samsum", "val.jsonl", '{"dialogue": "a", "summary": "b"}\n{"dialogue": 1\n', "line 2: "),
        ("samsum", "val.json", '{"dialogue": ', "line 1: "),
        ("samsum", "val.parquet", "no parquet", "cannot be read as parquet"),
        ("samsum", "val.jsonl", "[1]\n", "is not an object with named fields"),
        (
            "boolq",
            "test.json",
            '[{"instruction": "a", "answer": "maybe"}]',
            "row 1: the answer 'maybe' is not a key word",
        ),
        ("piqa", "nothing.json", "[]", "none of .* has a test or train file"),
    ],
)
def test_a_file_at_fault_is_named_with_its_line(tmp_path, name, file, text, said):
    (tmp_path / file).write_text(text)
    with pytest.raises(weft.WeftError, match=said):
        find_generation(f"{name}:{tmp_path}").load()


def test_parquet_files_and_the_hubs_reader_give_the_same_rows(folder, tmp_path, monkeypatch):
    import pyarrow as pa
    from pyarrow import parquet

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = read_rows(folder / "samsum" / "train.json")
    place = tmp_path / "held"
    place.mkdir()
    parquet.write_table(pa.Table.from_pylist(rows), place / "train.parquet")
    assert read_rows(place / "train.parquet") == rows
    assert (
        hub_rows(str(place), None, "train") == rows
    )  # a folder stands for a hub name here: nothing is fetched
    assert hub_rows(str(place), None, "validation") is None
    with pytest.raises(weft.WeftError, match="could not be loaded from the hub"):
        find_generation("samsum:nobody/nothing").load()


def test_e2e_meanings_in_either_notation_are_one_prompt():
    assert e2e.meaning_prompt(
        "name[X], eatType[pub], priceRange[less than £20], customer rating[3 out of 5]"
    ) == e2e.meaning_prompt(
        "name : X | Type : pub | price : less than £ 20 | customer rating : 3 out of 5"
    )
